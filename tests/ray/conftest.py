"""One undisturbed run for all tests on Ray."""

from __future__ import annotations

import pytest

from tests.runner import Runner


@pytest.fixture(scope="session")
def undisturbed(runner: Runner) -> str:
    """The name of a run that nothing happened to, with one sampler."""
    assert runner.here("undisturbed", fleet__samplers__max=1) == 0
    return "undisturbed"
