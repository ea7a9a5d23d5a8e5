"""The graph of a rollout: every leaf is scored once by every role, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from b2ray.actors.worker import Receipt
from b2ray.branching import Group, WorkUnit
from b2ray.diffusion.noise import Domain
from b2ray.fleet import rollout
from b2ray.fleet.rollout import Rollout

SCORERS = {"scorer": ["a", "b"], "scorer c": ["c"]}


def units(count: int = 3) -> list[WorkUnit]:
    return [
        WorkUnit(0, Domain.TRAIN, 0, 0, u, (Group(2 * u, "p"), Group(2 * u + 1, "q")), 3, 1)
        for u in range(count)
    ]


def slot(role: str, index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(role=SimpleNamespace(name=role), index=index)


def answer(call):
    """What a sound actor answers: a receipt and refs; scores tell which leaf they are of."""
    low, high = call.leaves
    if call.method == "denoise_prefix":
        return Receipt("sampler", "", 0, 0.0, 2), [f"prefix {call.unit.index}"]
    if call.method == "denoise_branches":
        refs = [f"leaf {call.unit.index} {leaf}" for leaf in range(low, high)]
        return Receipt("sampler", "", 0, 0.0, high - low), [object(), *refs]
    names = SCORERS[call.role]
    scores = {n: [100.0 * call.unit.index + leaf for leaf in range(low, high)] for n in names}
    vectors = np.array([[call.unit.index, leaf] for leaf in range(low, high)], np.float32)
    embeddings = vectors if call.role == "scorer c" and call.args[-1] else None
    return Receipt(call.role, "", 0, 0.0, 0, {"scores": scores, "embeddings": embeddings}), []


def drive(plan: Rollout, losses: float = 0.0, seed: int = 0) -> None:
    """Serve the plan with several slots in a random order, losing the inputs of some calls."""
    chance = random.Random(seed)
    slots = [slot("sampler"), slot("sampler", 1), slot("scorer"), slot("scorer c"), slot("learner")]
    flying: list = []
    lost: Counter[str] = Counter()
    for _ in range(10_000):
        if plan.finished:
            return
        busy = [s for s, _ in flying]
        free = [s for s in slots if s not in busy]
        chance.shuffle(free)
        flying += [(s, call) for s in free if (call := plan.next_call(s)) is not None]
        assert flying, "nothing is in flight, and the plan is not finished"
        done = flying.pop(chance.randrange(len(flying)))
        key = f"{done[1].role} {done[1].doing}"
        if done[1].method != "denoise_prefix" and lost[key] < 2 and chance.random() < losses:
            lost[key] += 1
            if done[1].method == "score":
                plan.lost(done[1])
            else:  # the dispatcher hands such a call to the plan alone
                plan.lost(done[1])
            continue
        plan.done(done[1], done[0], *answer(done[1]))
    raise AssertionError("the plan never finished")


@pytest.mark.parametrize("losses", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(20))
def test_every_leaf_has_every_score_once(losses, seed):
    counted: list[int] = []
    plan = Rollout(
        units(), 4, SCORERS, ["a", "c"], record=True, embed=True, progress=counted.append
    )
    drive(plan, losses, seed)
    expected = np.array([[100 * u + 3 * g + k for k in range(3)] for u in range(3) for g in (0, 1)])
    for name in ("a", "c"):
        np.testing.assert_array_equal(plan.reward_table(name), expected)
    assert sum(counted) == 18
    assert plan.vectors().tolist() == [[u, leaf] for u in range(3) for leaf in range(6)]
    assert plan.leaf(3, 2) == "leaf 1 5"


def test_roles_without_a_wanted_reward_are_not_asked():
    plan = Rollout(units(1), 4, SCORERS, ["a"], record=False)
    drive(plan)
    assert plan.next_call(slot("scorer c")) is None
    assert set(plan.scores) == {"a", "b"}  # what the role has loaded; the actor leaves out the rest


def test_pictures_of_the_first_leaves_are_kept(monkeypatch):
    plan = Rollout(units(2), 4, SCORERS, ["a", "c"], record=False, keep_pictures=7)
    monkeypatch.setattr(rollout.ray, "get", lambda ref: ref)
    drive(plan)
    assert sorted(plan.pictures) == [(0, 0), (0, 4), (1, 0)]
