"""The update on several ranks is the update on one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from b2ray.diffusion.lora_file import State, digest
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.errors import RankLost
from b2ray.objectives.ranks import Ranks
from b2ray.objectives.update import MAX_SKIPPED, Updater
from tests.models import config, selection
from tests.processes import on_ranks
from tests.unit.objectives.conftest import ADVANTAGES_7, ANY_DRIFT, PROMPTS_7, STEPS

WORLDS = (1, 2, 3)
# How many trajectories are selected, and settings. Batches of at most 3: of 7 they have 3, 2 and 2,
# so that shares are uneven, and empty where there are fewer trajectories than ranks.
CASES: dict[str, tuple[int, dict[str, object]]] = {
    "uneven": (7, {}),
    "whole": (6, {"learner__batch": 6, "learner__microbatch": 2}),
    "two": (2, {}),
    "one": (1, {}),
    "none": (0, {}),
    "recomputed": (7, {"learner__recompute_log_probs": True, "learner__max_ratio_drift": 0.1}),
    "near the base": (7, {"objective__kl_weight": 0.5}),
    "scaled": (7, {}),
}


@dataclass(frozen=True)
class Setting:
    """What a rank needs to make the updater of the tests, and the same selection."""

    models: Path
    weights: State
    sampled: list[Trajectory]

    def updater(self, ranks: Ranks, policy: Policy | None = None, **over: object) -> Updater:
        settings = {"sampling__steps": STEPS, "learner__batch": 3, **ANY_DRIFT, **over}
        made = config(self.models, **settings)
        policy = policy or Policy(made, torch.device("cpu"))
        policy.bind(self.weights)
        return Updater(policy, made, ranks)

    def selected(self, count: int = 7) -> list[Selected]:
        return selection(self.sampled, PROMPTS_7, ADVANTAGES_7)[:count]


@dataclass(frozen=True)
class End:
    """What an update left behind on one rank."""

    weights: State
    optimizer: State
    figures: dict[str, float]
    drift: dict[int, float]
    unet_evals: int
    visits: list[int]


def ends_of_cases(ranks: Ranks, setting: Setting) -> dict[str, End]:
    policy = setting.updater(ranks).policy
    return {name: end_of_case(ranks, setting, policy, name) for name in CASES}


def end_of_case(ranks: Ranks, setting: Setting, policy: Policy, name: str) -> End:
    count, over = CASES[name]
    learner, visits = setting.updater(ranks, policy, **over), []
    if name == "scaled":
        learner.loss_scale = 256.0
    selected = setting.selected(count)
    drift = learner.dry_run(selected)
    counted = [
        replace(s, fetch=lambda j=j, s=s: visits.append(j) or s.fetch())
        for j, s in enumerate(selected)
    ]
    before = learner.policy.unet_evals
    figures = learner.update(0, counted)
    evals = learner.policy.unet_evals - before
    weights = learner.policy.lora_state()
    return End(weights, learner.optimizer_state(), figures, drift, evals, visits)


@pytest.fixture(scope="module")
def setting(models, first_weights, sampled) -> Setting:
    return Setting(models, first_weights, sampled)


@pytest.fixture(scope="module")
def ends(setting) -> dict[int, list[dict[str, End]]]:
    """By number of ranks: of each rank, the end of every case."""
    return {world: on_ranks(world, ends_of_cases, setting) for world in WORLDS}


def vector(state: State, kind: str = "") -> np.ndarray:
    found = [state[n].ravel() for n in sorted(state) if n.endswith(kind)]
    return np.concatenate([*found, np.zeros(0)])


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """Distance, relative to the length of what is expected."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_make_the_update_of_one(ends, first_weights, world, subtests):
    (alone,), first = ends[1], vector(first_weights)
    for case in CASES:
        with subtests.test(case=case):
            for rank in ends[world]:
                compare(rank[case], alone[case], first)


def compare(end: End, expected: End, first: np.ndarray) -> None:
    """Hold what an update left against what it should have left, from these first weights."""
    assert off(vector(end.weights) - first, vector(expected.weights) - first) < 1e-3
    for kind, allowed in (("/exp_avg", 1e-4), ("/exp_avg_sq", 1e-4), ("/step", 0)):
        assert off(vector(end.optimizer, kind), vector(expected.optimizer, kind)) <= allowed
    assert end.figures == pytest.approx(expected.figures, rel=1e-3, abs=1e-6)
    assert end.drift == pytest.approx(expected.drift, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_all_ranks_end_with_the_same_bytes_and_figures(ends, world):
    first, *others = [summary(rank) for rank in ends[world]]
    assert first.keys() == CASES.keys()
    assert others == [first] * (world - 1)


def summary(rank: dict[str, End]) -> dict[str, tuple]:
    """What must be equal on all ranks, by case."""
    return {
        case: (digest(end.weights), digest(end.optimizer), end.figures, end.drift)
        for case, end in rank.items()
    }


@pytest.mark.parametrize("world", WORLDS)
def test_every_trajectory_is_the_work_of_one_rank(ends, world, subtests):
    for case, (count, over) in CASES.items():
        with subtests.test(case=case):
            of_ranks, (alone,) = [rank[case] for rank in ends[world]], ends[1]
            visits = [j for end in of_ranks for j in end.visits]
            passes = 2 + ("recompute" in str(over))
            assert sorted(visits) == sorted([*range(count)] * passes)
            assert sum(end.unet_evals for end in of_ranks) == alone[case].unet_evals


def test_the_cases_move_the_weights(ends, first_weights):
    (one,) = ends[1]
    still = {name for name, end in one.items() if digest(end.weights) == digest(first_weights)}
    assert still == {"none"}
    assert len({digest(end.weights) for end in one.values()} - {digest(first_weights)}) >= 5


# --- what one rank sees decides for all ------------------------------------------------------


def with_trajectory(
    selected: Sequence[Selected], j: int, change: Callable[[Selected], Selected]
) -> list[Selected]:
    return [change(s) if i == j else s for i, s in enumerate(selected)]


def skips(ranks: Ranks, setting: Setting) -> tuple[list[dict[str, float]], str, str]:
    """Figures of updates with one advantage that is no number, the digest, and the last words."""
    learner = setting.updater(ranks, learner__inner_epochs=1, learner__batch=100)
    bad = with_trajectory(setting.selected(), 1, lambda s: replace(s, advantage=float("nan")))
    figures = [learner.update(stage, bad) for stage in range(MAX_SKIPPED - 1)]
    end = digest(learner.policy.lora_state())
    try:
        learner.update(MAX_SKIPPED, bad)
    except ValueError as error:
        return figures, end, str(error)
    return figures, end, "went on"


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(setting, world):
    for figures, end, words in on_ranks(world, skips, setting):
        counts = [(f["policy/updates"], f["policy/skipped_updates"]) for f in figures]
        assert counts == [(0, 1)] * (MAX_SKIPPED - 1)
        assert end == digest(setting.weights)
        assert f"not finite {MAX_SKIPPED} times in a row" in words


def drifted(ranks: Ranks, setting: Setting, fresh: bool) -> dict[str, float]:
    """An update on densities of which one trajectory's is of other weights."""
    learner = setting.updater(ranks, learner__batch=100, learner__max_ratio_drift=0.1)
    off = replace(setting.sampled[1], log_probs=setting.sampled[1].log_probs + np.float32(0.05))
    bad = with_trajectory(setting.selected(), 1, lambda s: replace(s, fetch=lambda: off))
    return learner.update(0, bad, fresh=lambda: fresh)


def test_a_drift_on_one_rank_is_refused_on_all(setting):
    ends = on_ranks(3, drifted, setting, True)
    assert [type(e) for e in ends] == [ValueError] * 3
    assert len({str(e) for e in ends}) == 1 and "max_ratio_drift" in str(ends[0])


def test_a_drift_of_older_weights_is_a_figure_on_all(setting):
    ends = on_ranks(3, drifted, setting, False)
    expected = (1 - np.exp(-0.05)) / 7
    assert {e["policy/ratio_drift"] for e in ends} == {ends[0]["policy/ratio_drift"]}
    assert ends[0]["policy/ratio_drift"] == pytest.approx(expected, rel=1e-2)
    assert ends[0]["policy/ratio_drift_max"] == pytest.approx(7 * expected, rel=1e-2)


def unfetched(ranks: Ranks, setting: Setting, kill: bool) -> dict[str, float]:
    """An update in which rank 1 cannot fetch a trajectory, or dies over it."""

    def fetch() -> Trajectory:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise LookupError("a trajectory is gone")

    bad = with_trajectory(setting.selected(), 1, lambda s: replace(s, fetch=fetch))
    return setting.updater(ranks, learner__batch=100).update(0, bad)


@pytest.mark.parametrize("kill", [False, True])
def test_a_rank_that_fails_alone_says_why_and_the_others_do_not_hang(setting, kill):
    ends = on_ranks(3, unfetched, setting, kill, timeout=60.0)
    assert isinstance(ends[0], RankLost) and isinstance(ends[2], RankLost)
    assert ends[1] is None if kill else isinstance(ends[1], LookupError)
