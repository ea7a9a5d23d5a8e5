"""A run with replay, a lag and an interval that grows by the spread, killed between its stages."""

from __future__ import annotations

import pytest

from tests.runner import ColdRunner, Runner

# The share is always too small, so that the interval grows by a step a stage: 1, 2, 3 and 4.
SETTINGS = {
    "curriculum__stages": 4,
    "curriculum__start": 1,
    "curriculum__extend": "spread",
    "curriculum__min_share": 0.999,
    "curriculum__patience": 1,
    "learner__max_lag": 1,
    "replay__stages": 2,
    "replay__trajectories": 12,
}
STEADY = ("replay/trajectories", "replay/age", "cost/unet_evals", "interval", "fleet/lag")


@pytest.mark.timeout(600)  # two starts of the command
def test_killed_between_its_stages_it_resumes_to_the_same_bytes(
    runner: Runner, cold_runner: ColdRunner
) -> None:
    """Before the first stage that replays, whose interval has grown, and between two that do."""
    assert runner.here("everything", **SETTINGS) == 0
    stages = runner.figures("everything")[1:]
    assert [line["replay/trajectories"] for line in stages] == [0, 8, 12, 12]
    assert [line["interval"] for line in stages] == [1, 2, 3, 4]
    assert [line["fleet/lag"] for line in stages] == [0, 1, 1, 1]

    for lines in (2, 4):
        cold_runner.kill_after(lines, "everything-killed", **SETTINGS)
        assert not (runner.runs / "everything-killed" / "summary.json").exists()
    assert runner.here("everything-killed", "--resume", **SETTINGS) == 0
    assert runner.lora("everything-killed") == runner.lora("everything")
    resumed = runner.figures("everything-killed")
    for key in STEADY:
        expected = [line.get(key) for line in runner.figures("everything")]
        assert [line.get(key) for line in resumed] == expected, key
