"""One sandbox and one cluster for all pages; over before the tests that start Ray themselves."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.sandbox import Sandbox


@pytest.fixture(scope="package")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    import torch

    torch.set_num_threads(1)
    state = Path(tempfile.mkdtemp(prefix="b2-", dir="/tmp"))  # sockets' names must be short
    found = Sandbox(tmp_path_factory.mktemp("docs"), state)
    try:
        with found.cluster():
            found.prepare()
            yield found
    finally:
        shutil.rmtree(state, ignore_errors=True)
