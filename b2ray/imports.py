"""Importing what is large."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For imports of torch, transformers and diffusers: no garbage collection inside, and what is
    there afterwards is never looked through again.

    Nearly all of the 750,000 objects that they make stay. Looking for garbage among them takes a
    fifth of an import's processor time (benchmarks/imports.py), and every actor of a run imports.
    Only while a process starts, before there is anything that may be thrown away.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
