"""One sandbox for all pages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.sandbox import Sandbox
from tests.runner import Runner


@pytest.fixture(scope="package")
def sandbox(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    state = Path(tempfile.mkdtemp(prefix="b2-", dir="/tmp"))  # sockets' names must be short
    made = Sandbox(tmp_path_factory.mktemp("docs"), state, runner)
    try:
        made.prepare()
        yield made
    finally:
        made.close()
        shutil.rmtree(state, ignore_errors=True)
