"""Sampling that lags a stage behind: the same bytes whatever happens, and the lag on record."""

from __future__ import annotations

import pytest

from tests.runner import Runner

LAG = {"learner__max_lag": 1, "curriculum__stages": 4, "fleet__samplers__max": 1}


@pytest.fixture(scope="module")
def lagging(runner: Runner) -> str:
    assert runner.here("lagging", **LAG) == 0
    return "lagging"


def test_the_first_stage_does_not_lag_and_the_others_do(runner: Runner, lagging: str) -> None:
    assert [line["fleet/lag"] for line in runner.figures(lagging)[1:]] == [0, 1, 1, 1]


def test_it_samples_from_other_weights_than_a_run_that_does_not_lag(
    runner: Runner, lagging: str
) -> None:
    assert runner.here("prompt", **{**LAG, "learner__max_lag": 0}) == 0
    assert runner.lora("prompt") != runner.lora(lagging)
