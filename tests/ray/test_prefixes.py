"""Runs whose prefixes serve in several stages."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from itertools import pairwise

import pytest

from b2ray.commands.check import main as check
from b2ray.cost import plan_cost
from b2ray.prompts import PromptSet
from tests.models import PROMPTS, arguments, config
from tests.runner import Cluster, Runner, kill_when, when

# Four groups of three branches, T = 4, intervals 1, 1, 2, 2 and 3: the fork moves to earlier steps
# while prefixes serve. With reuse stages 0 and 3 make their own; with base the first one makes
# those of all three prompts and a fourth, and each of two others one for a prompt's second group.
INTERVALS = (1, 1, 2, 2, 3)
SHARED = {
    "curriculum__stages": 5,
    "curriculum__start": 1,
    "curriculum__end": 3,
    "fleet__samplers__max": 1,
}
ONCE = {"curriculum__stages": 1, "curriculum__start": 2, "curriculum__end": 2}
POLICIES = {
    "base": {**SHARED, "prefix__policy": "base"},
    "reuse": {**SHARED, "prefix__policy": "reuse", "prefix__stages": 2},
}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(runner: Runner, policy: str) -> str:
    """The name of a run that nothing happens to."""
    assert runner.here(f"prefix_{policy}", **POLICIES[policy]) == 0
    return f"prefix_{policy}"


def sampled(lines: Sequence[dict[str, float]], passes: int) -> list[float]:
    """What each stage took for sampling: all its UNet evaluations but those of learning."""
    return [
        after["cost/unet_evals"]
        - before.get("cost/unet_evals", 0)
        - passes
        * after["interval"]
        * (after["cost/trained_leaves"] - before.get("cost/trained_leaves", 0))
        for before, after in pairwise(lines)
    ]


def test_stages_make_the_prefixes_that_no_earlier_one_has(
    runner: Runner, shared: str, policy: str
) -> None:
    lines = runner.figures(shared)
    made = [line["prefix/made"] for line in lines[1:]]
    if policy == "reuse":
        assert made == [4, 0, 0, 4, 0]
    else:
        # No prompt has more than two of four groups.
        assert made[0] == 4 and 4 < sum(made) <= 6
    assert [line["interval"] for line in lines[1:]] == [*INTERVALS]
    expected = [m * (4 - n) + 12 * n for m, n in zip(made, INTERVALS, strict=True)]
    assert sampled(lines, passes=2) == expected
    assert all(line["policy/ratio_drift_max"] < 1e-4 for line in lines[1:])


def test_it_costs_what_was_planned(runner: Runner, shared: str, policy: str) -> None:
    planned = plan_cost(
        config(runner.models, **POLICIES[policy]), prompts=PromptSet(tuple(PROMPTS))
    )
    found = runner.figures(shared)[-1]
    assert found["cost/unet_evals"] == planned.unet_evals
    assert found["cost/reward_queries"] == planned.reward_queries


@pytest.fixture(scope="module")
def one_stage(runner: Runner) -> bytes:
    """The LoRA of a run of one stage with prefixes of the current policy."""
    assert runner.here("prefix_once", **SHARED | ONCE) == 0
    assert not any("prefix/made" in line for line in runner.figures("prefix_once"))
    return runner.lora("prefix_once")


def test_the_first_stage_is_that_of_the_current_policy(
    runner: Runner, one_stage: bytes, policy: str
) -> None:
    """Its prefixes are the same: of the first weights, which are the base model's."""
    name = f"prefix_once_{policy}"
    assert runner.here(name, **{**POLICIES[policy], **ONCE}) == 0
    assert runner.lora(name) == one_stage


@pytest.mark.timeout(900)  # three starts of the command
def test_killed_it_resumes_to_the_same_bytes(runner: Runner, shared: str, policy: str) -> None:
    """Twice while prefixes serve that a stage before made, once across a growth of the interval."""
    name = f"prefix_killed_{policy}"
    for count in (2, 3):
        process = runner.process(name, **POLICIES[policy])
        when(lambda n=count: runner.lines(name) >= n)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert runner.here(name, "--resume", **POLICIES[policy]) == 0
    assert runner.lora(name) == runner.lora(shared)
    found, expected = runner.figures(name), runner.figures(shared)
    for key in ("prefix/made", "cost/unet_evals"):
        assert [line.get(key) for line in found] == [line.get(key) for line in expected]


def test_a_killed_sampler_changes_nothing(
    runner: Runner, cluster: Cluster, shared: str, policy: str
) -> None:
    """One of two: how many there are changes nothing either."""
    name = f"prefix_replaced_{policy}"
    killers = [
        kill_when(lambda n=count: runner.lines(name) >= n, lambda: cluster.workers("Sampler"))
        for count in (1, 3)
    ]
    assert runner.here(name, **{**POLICIES[policy], "fleet__samplers__max": 2}) == 0
    for killer in killers:
        killer.join()
    assert runner.lora(name) == runner.lora(shared)


@pytest.mark.parametrize(
    ("which", "over"),
    [
        ("base", {"learner__max_lag": 1, "curriculum__extend": "spread"}),
        ("reuse", {"learner__max_lag": 1, "replay__stages": 2, "replay__trajectories": 5}),
    ],
)
def test_it_goes_with_a_lag_with_replay_and_with_the_spread(
    runner: Runner, which: str, over: dict[str, object]
) -> None:
    name = f"prefix_more_{which}"
    assert runner.here(name, **{**POLICIES[which], **over}) == 0
    lines = runner.figures(name)[1:]
    made = [line["prefix/made"] for line in lines]
    assert made == [4, 0, 0, 4, 0] if which == "reuse" else made[0] == 4 > max(made[1:])
    assert [line["fleet/lag"] for line in lines] == [0, 1, 1, 1, 1]
    assert not list((runner.runs / name / "prefixes").iterdir())


def test_check_rehearses_it(runner: Runner, policy: str, capsys) -> None:
    words = arguments(runner.models, runner.runs, "checked_prefix", **POLICIES[policy])
    assert check([*words, "--json"]) == 0
    planned = plan_cost(
        config(runner.models, **POLICIES[policy]), prompts=PromptSet(tuple(PROMPTS))
    )
    assert f"{planned.unet_evals_sampling:,} sampling" in capsys.readouterr().out
