"""The learner's actors: ranks that meet, results, lags, and errors that cross as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from b2ray.actors.learner import Learner
from b2ray.algorithm.replay import ReplayEntry
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.trajectory import Trajectory
from b2ray.errors import RankLost, WorkerError
from tests.models import PROMPTS, config, rollout
from tests.processes import free_port
from tests.runner import Cluster

pytestmark = pytest.mark.cold  # ranks, and one of them is killed
INTERVAL = 2
ADVANTAGES = [1.0, -0.5, 0.7]
TIMEOUT = 120.0


@pytest.fixture(scope="module")
def sampled(models: Path) -> list[Trajectory]:
    """A trajectory of version 0 for each prompt."""
    return rollout(Policy(config(models), torch.device("cpu")), PROMPTS, INTERVAL)


@pytest.fixture
def learners(cluster: Cluster, models: Path) -> Iterator[Callable[..., list[Any]]]:
    """Starts and loads the actors of a learner."""
    started = []

    def start(world: int, **over: object) -> list[Any]:
        settings = config(models, learner__ranks=world, **over)
        address = f"127.0.0.1:{free_port()}" if world > 1 else ""
        actors = [ray.remote(num_cpus=0.5)(Learner).remote() for _ in range(world)]
        started.extend(actors)
        loads = [a.load.remote(settings, PROMPTS, r, address) for r, a in enumerate(actors)]
        ray.get(loads, timeout=TIMEOUT)
        return actors

    yield start
    for actor in started:
        ray.kill(actor)


def selected(trajectories: list[Trajectory]) -> list[tuple[str, float, int, Any]]:
    refs = [ray.put(t) for t in trajectories]
    return [(p, a, INTERVAL, ref) for p, a, ref in zip(PROMPTS, ADVANTAGES, refs, strict=True)]


def called(actors: list[Any], method: str, *args: Any) -> list[list[Any]]:
    """The three results of a call of every rank."""
    calls = [getattr(a, method).options(num_returns=3).remote(*args) for a in actors]
    return [ray.get(call, timeout=TIMEOUT) for call in calls]


def test_ranks_answer_alike_and_only_the_first_sends_arrays(
    learners: Callable[..., list[Any]], sampled: list[Trajectory]
) -> None:
    two, one = learners(2), learners(1)
    states = called(two, "state")
    assert states[0][0].digest == states[1][0].digest
    assert states[0][1] and states[1][1:] == [None, None]

    updates = called(two, "update", 0, selected(sampled), 0)
    (single,) = called(one, "update", 0, selected(sampled), 0)
    answers = [u[0] for u in updates]
    assert [a.receipt.version for a in answers] == [1, 1]
    assert answers[0].digest == answers[1].digest
    assert answers[0].digest != states[0][0].digest
    assert answers[0].figures == answers[1].figures
    assert answers[0].figures == pytest.approx(single[0].figures, rel=1e-3, abs=1e-6)
    assert sum(a.receipt.unet_evals for a in answers) == single[0].receipt.unet_evals
    assert updates[0][1].keys() == single[1].keys() and updates[0][2].keys() == single[2].keys()
    assert updates[1][1:] == [None, None]

    # One of the three is of the new version. Its densities are those of older weights, and all
    # is accepted: the ratio corrects what is late.
    late = [sampled[0], replace(sampled[1], version=1), sampled[2]]
    for answer, _, _ in called(two, "update", 1, selected(late), 1):
        assert answer.figures["fleet/lag"] == pytest.approx(2 / 3)
        assert answer.figures["policy/ratio_drift"] > 0

    # At version 2 these are too old for any setting: each rank says so of its own.
    for actor in two:
        with pytest.raises(RayTaskError, match="policy version 0 reached the learner") as caught:
            called([actor], "dry_run", selected(sampled))
        assert isinstance(caught.value.cause, WorkerError)

    ray.kill(two[1])
    with pytest.raises(RayTaskError) as caught:
        current = [replace(t, version=2) for t in sampled]
        called(two[:1], "dry_run", selected(current))
    assert isinstance(caught.value.cause, RankLost)


def test_what_is_replayed_may_be_older_by_its_age_and_no_more(
    learners: Callable[..., list[Any]], sampled: list[Trajectory]
) -> None:
    learner = learners(1, replay__stages=2, learner__batch=8)

    def old(stage: int, version: int) -> ReplayEntry:
        made = replace(sampled[0], version=version)
        return ReplayEntry(stage, PROMPTS[0], 1.0, INTERVAL, ray.put(made))

    def update(stage: int, max_lag: int, *replayed: ReplayEntry) -> dict[str, float]:
        own = [replace(t, version=max(0, stage - max_lag)) for t in sampled]
        ((answer, _, _),) = called(learner, "update", stage, selected(own), max_lag, replayed)
        return dict(answer.figures)

    assert update(0, 0)["fleet/lag"] == 0
    # The lag is that of the stage's own.
    assert update(1, 1, old(0, 0))["fleet/lag"] == 1
    assert update(2, 1, old(0, 0), old(1, 0), old(1, 1))["fleet/lag"] == 1
    # From the learner's own version, from one before its stage's, and kept for three stages.
    for kept, words in (
        (old(2, 3), "version 3 reached .* a lag of 1 to 1 is"),
        (old(2, 1), "version 1 reached .* a lag of 1 to 1 is"),
        (old(0, 0), "version 0 reached .* a lag of 3 to 2 is"),
    ):
        with pytest.raises(RayTaskError, match=words):
            update(3, 0, kept)
