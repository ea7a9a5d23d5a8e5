"""Runs that train again on what earlier stages left."""

from __future__ import annotations

import pytest

from b2ray.algorithm.cost import plan_cost
from b2ray.algorithm.replay import FILE, load
from tests.models import config
from tests.runner import Runner

# Four groups of three leaves: eight are trained on in a stage, intervals 2, 2, 3 and 4.
REPLAY = {
    "replay__stages": 2,
    "replay__trajectories": 12,
    "curriculum__stages": 4,
    "fleet__samplers__max": 1,
}


@pytest.fixture(scope="module")
def replaying(runner: Runner) -> str:
    assert runner.here("replaying", **REPLAY) == 0
    return "replaying"


def test_the_figures_show_what_is_replayed(runner: Runner, replaying: str) -> None:
    stages = runner.figures(replaying)[1:]
    assert [line["replay/trajectories"] for line in stages] == [0, 8, 12, 12]
    assert "replay/age" not in stages[0] and stages[1]["replay/age"] == 1
    assert all(1 <= line["replay/age"] <= 2 for line in stages[2:])
    assert [line["cost/trained_leaves"] for line in stages] == [8, 24, 44, 64]
    assert all(line["fleet/lag"] == 0 for line in stages)
    # The samplers' weights are the learner's: what is older does not hide it.
    assert all(line["policy/ratio_drift_max"] < 1e-4 for line in stages)


def test_it_costs_no_more_than_was_planned(runner: Runner, replaying: str) -> None:
    settings = config(runner.models, **REPLAY)
    found, planned = runner.figures(replaying)[-1], plan_cost(settings)
    assert found["cost/reward_queries"] == planned.reward_queries
    # What is replayed may have shorter intervals than the latest that it could have.
    least = plan_cost(config(runner.models, **{**REPLAY, "replay__stages": 0})).unet_evals
    assert least < found["cost/unet_evals"] <= planned.unet_evals


def test_every_commit_has_what_its_next_stage_trains_on(runner: Runner, replaying: str) -> None:
    third, last = sorted((runner.runs / replaying / "checkpoints").iterdir())
    kept = load(third)
    assert {k.stage for k in kept} == {1, 2} and len(kept) == 12
    assert all(k.trajectory.version == k.stage for k in kept)
    assert all(len(k.trajectory.log_probs) == k.interval == k.stage + 1 for k in kept)
    assert not (last / FILE).exists()


def test_replay_changes_what_is_learnt(runner: Runner, replaying: str) -> None:
    assert runner.here("no_replay", **{**REPLAY, "replay__stages": 0}) == 0
    assert runner.lora("no_replay") != runner.lora(replaying)
    assert not any("replay/trajectories" in line for line in runner.figures("no_replay"))


@pytest.mark.parametrize(
    "over",
    [
        {"learner__max_lag": 1},
        {"preset": "d3po", "branching__branches": 2, "curriculum__start": 2},
    ],
    ids=["lag", "pairs"],
)
def test_it_goes_with_a_lag_and_with_pairs(runner: Runner, over: dict[str, object]) -> None:
    name = f"replay_{next(iter(over))}"
    assert runner.here(name, **{**REPLAY, **over, "replay__trajectories": 5}) == 0
    pairs = "preset" in over
    counts = [line["replay/trajectories"] for line in runner.figures(name)[1:]]
    assert counts == [0, *[4 if pairs else 5] * 3]
