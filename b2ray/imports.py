"""Faster imports of large libraries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collection while torch, transformers and diffusers are imported.

    Nearly all of the 750,000 objects that these libraries create stay alive. Searching them for
    garbage takes a fifth of the processor time of an import (docs/explanation/decided_against.md),
    and every actor of a run imports them. All objects that exist at the end are exempt from later
    collections, too. So use this only while a process starts, before it has made garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
