"""The graph of a rollout: every leaf is scored once by every role, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from b2ray.actors.messages import BranchesMade, PrefixesMade, Receipt, Scored
from b2ray.algorithm.branching import Group, WorkUnit
from b2ray.diffusion.noise import Domain
from b2ray.diffusion.pictures import FORK
from b2ray.rollout import rollout
from b2ray.rollout.rollout import RolloutPlan
from b2ray.rollout.work import Step

SCORERS = {"scorer": ["a", "b"], "scorer c": ["c"]}


def units(count: int = 3) -> list[WorkUnit]:
    return [
        WorkUnit(0, Domain.TRAIN, 0, 0, 3, 1, u, (Group(2 * u, "p"), Group(2 * u + 1, "q")))
        for u in range(count)
    ]


def slot(role: str, index: int = 0, version: int = 0) -> SimpleNamespace:
    return SimpleNamespace(role=SimpleNamespace(name=role), index=index, version=version)


def answer(call):
    """What a sound actor answers, and references; scores tell which leaf they are of."""
    unit, leaves, args = call.work.unit, call.work.leaves, call.requests[0].args
    if call.work.step == Step.PREFIX:
        return PrefixesMade(Receipt("sampler", "", 0, 0.0, 2), 0), [f"prefix {unit.index}"]
    span, receipt = range(leaves.low, leaves.high), Receipt(call.role, "", 0, 0.0, len(leaves))
    if call.method == "trajectories_to_demonstrations":
        divergences = [leaf / 8 for leaf in span]
        refs = [f"leaf {unit.index} {leaf}" for leaf in span]
        return BranchesMade(receipt, divergences=divergences), [object(), *refs]
    if call.work.step == Step.BRANCHES:
        *_, record, _, trees = args
        wanted = [(g, k) for g, k in unit.leaves(leaves.low, leaves.high) if g < trees]
        small = {leaf: f"{unit.index} {leaf}" for leaf in wanted}
        small |= {(g, FORK): f"{unit.index} fork {g}" for g, k in wanted if k == 0}
        refs = [f"leaf {unit.index} {leaf}" for leaf in span] if record else []
        assert call.requests[0].objects == 1 + len(refs)
        return BranchesMade(receipt, thumbnails=small), [object(), *refs]
    scores = {n: [100.0 * unit.index + leaf for leaf in span] for n in SCORERS[call.role]}
    vectors = np.array([[unit.index, leaf] for leaf in span], np.float32)
    embeddings = vectors if call.role == "scorer c" and args[-1] else None
    return Scored(Receipt(call.role, "", 0, 0.0), scores, embeddings), []


def drive(plan: RolloutPlan, losses: float = 0.0, seed: int = 0) -> None:
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
        if lost[key] < 2 and chance.random() < losses:
            lost[key] += 1
            plan.lost(done[1])
            continue
        plan.done(done[1], done[0], *answer(done[1]))
    raise AssertionError("the plan never finished")


@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_every_leaf_has_every_score_once(losses, subtests):
    for seed in range(20):
        with subtests.test(seed=seed):
            drive_and_check_the_scores(losses, seed)


def drive_and_check_the_scores(losses: float, seed: int) -> None:
    counted: list[int] = []
    plan = RolloutPlan(
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
    plan = RolloutPlan(units(1), 4, SCORERS, ["a"], record=False)
    drive(plan)
    assert plan.next_call(slot("scorer c")) is None
    assert set(plan.scores) == {"a", "b"}  # what the role has loaded; the actor leaves out the rest


def test_pictures_of_the_first_leaves_are_kept(monkeypatch):
    plan = RolloutPlan(units(2), 4, SCORERS, ["a", "c"], record=False, keep_pictures=7)
    monkeypatch.setattr(rollout.ray, "get", lambda ref: ref)
    drive(plan)
    assert sorted(plan.pictures) == [(0, 0), (0, 4), (1, 0)]


@pytest.mark.parametrize("losses", [0.0, 0.3])
@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_small_pictures_of_the_first_groups_are_kept(losses, count):
    """Groups are counted over all units, of two groups each; a call has leaves of both."""
    plan = RolloutPlan(units(), 4, SCORERS, ["a"], record=True, trees=count)
    drive(plan, losses)
    assert plan.thumbnails == {
        (g, k): f"{g // 2} fork {g % 2}" if k == FORK else f"{g // 2} {(g % 2, k)}"
        for g in range(min(count, 6))
        for k in (FORK, 0, 1, 2)
    }


@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_lost_leaves_are_branched_again_and_not_scored_again(losses):
    counted: list[int] = []
    plan = RolloutPlan(units(), 4, SCORERS, ["a", "c"], record=True, progress=counted.append)
    drive(plan)
    kept = [(0, 1), (3, 2), (5, 0)]
    plan.keep(kept)
    assert len(plan.trajectories) == 3
    for group, branch in kept[1:]:
        plan.trajectories[plan._key(group, branch)] = "gone"
    plan.again(kept[1:])
    assert not plan.finished
    drive(plan, losses)
    assert [plan.leaf(*leaf) for leaf in kept] == ["leaf 0 1", "leaf 1 5", "leaf 2 3"]
    assert sum(counted) == 18


def test_samplers_pause_while_the_scorers_are_behind(monkeypatch):
    monkeypatch.setattr(rollout, "MOST_UNSCORED", 2)
    plan, sampler = RolloutPlan(units(9), 4, SCORERS, ["a", "c"], record=True), slot("sampler")
    done = []
    while (call := plan.next_call(sampler)) is not None:
        done.append(call.method)
        plan.done(call, sampler, *answer(call))
    assert done == ["denoise_prefix", "denoise_branches", "denoise_branches"]
    assert plan.next_call(slot("scorer c")) is not None
    assert plan.next_call(sampler) is None  # the other role is still behind
    assert plan.next_call(slot("scorer")) is not None
    assert plan.next_call(sampler) is not None


def test_the_last_prefixes_come_before_branches():
    """With two samplers the last two units are begun as early as possible, then shared."""
    plan, first, second = RolloutPlan(units(3), 2, SCORERS, ["a"], record=True), *two()
    opening = [plan.next_call(first), plan.next_call(second)]
    assert [c.method for c in opening if c] == ["denoise_prefix"] * 2
    for call, sampler in zip(opening, (first, second), strict=True):
        plan.done(call, sampler, *answer(call))
    third = plan.next_call(first)
    assert third is not None and third.method == "denoise_prefix" and third.work.unit.index == 2
    # The second goes on with its own prefix, then with the first's.
    followed = [plan.next_call(second) for _ in range(4)]
    assert [c.work.unit.index for c in followed if c] == [1, 1, 1, 0]


def two() -> tuple[SimpleNamespace, SimpleNamespace]:
    return slot("sampler", 0), slot("sampler", 1)


def test_what_is_held_is_counted():
    plan = RolloutPlan(units(1), 6, SCORERS, ["a"], record=True)
    sampler, scorer = slot("sampler"), slot("scorer")

    def step(who: SimpleNamespace, **values: int) -> None:
        call = plan.next_call(who)
        found, results = answer(call)
        plan.done(call, who, replace(found, **values), results)

    step(sampler, nbytes=100)
    step(sampler, nbytes=600, picture_nbytes=50)
    assert plan.held == 750
    step(scorer)
    assert plan.finished and plan.held == 700
    plan.keep([(0, 0), (1, 1)])
    assert plan.held == 300


def test_samplers_at_another_version_get_nothing():
    plan = RolloutPlan(units(1), 4, SCORERS, ["a"], record=True)
    assert plan.next_call(slot("sampler", version=1)) is None
    assert plan.next_call(slot("sampler", version=0)) is not None


# --- demonstrations and what is not scored ---------------------------------------------------


def shown(tmp_path, count: int = 2) -> list[WorkUnit]:
    """Work units of five demonstrations, after those of `units`."""
    (tmp_path / "a.png").write_bytes(b"picture")
    groups = tuple(Group(g, "p", str(tmp_path / "a.png")) for g in range(5))
    return [WorkUnit(0, Domain.DEMONSTRATE, 0, 0, 1, 1, 3 + u, groups) for u in range(count)]


@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_demonstrations_are_followed_beside_the_own(tmp_path, losses, subtests):
    for seed in range(10):
        with subtests.test(seed=seed):
            drive_and_check_the_leaves([*units(), *shown(tmp_path)], losses, seed)


def drive_and_check_the_leaves(work: list[WorkUnit], losses: float, seed: int) -> None:
    counted: list[int] = []
    plan = RolloutPlan(work, 4, {}, [], record=True, progress=counted.append)
    drive(plan, losses, seed)
    assert sum(counted) == 18 + 10
    assert len(plan.trajectories) == 28
    # Groups are counted over all units: six of three branches, then ten of one.
    assert (plan.leaf(5, 2), plan.leaf(6, 0), plan.leaf(15, 0)) == (
        *("leaf 2 5", "leaf 3 0", "leaf 4 4"),
    )
    assert plan.divergences == {(u, leaf): leaf / 8 for u in (3, 4) for leaf in range(5)}


@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_lost_demonstrations_are_made_again(tmp_path, losses):
    plan = RolloutPlan([*units(), *shown(tmp_path)], 4, {}, [], record=True)
    drive(plan)
    kept = [(0, 1), (7, 0), (15, 0)]
    plan.keep(kept)
    for group, branch in kept[1:]:
        plan.trajectories[plan._key(group, branch)] = "gone"
    plan.again(kept[1:])
    assert not plan.finished
    drive(plan, losses)
    assert [plan.leaf(*leaf) for leaf in kept] == ["leaf 0 1", "leaf 3 1", "leaf 4 4"]


def test_a_call_has_the_files_and_only_own_leaves_are_scored(tmp_path):
    plan = RolloutPlan([*units(1), *shown(tmp_path, 1)], 8, SCORERS, ["a"], record=True)
    calls, sampler = [], slot("sampler")
    while (call := plan.next_call(sampler)) is not None:
        calls.append(call)
        plan.done(call, sampler, *answer(call))
    args = {call.method: call.requests[0].args for call in calls}
    assert args["encode_demonstrations"][1] == [b"picture"] * 5
    assert args["trajectories_to_demonstrations"][1:] == ("prefix 3", 0, 5)
    assert args["denoise_branches"][-2] is True  # its pictures are wanted
    scored = plan.next_call(slot("scorer"))
    assert scored.work.unit.index == 0 and plan.next_call(slot("scorer")) is None
    plan.done(scored, slot("scorer"), *answer(scored))
    assert plan.finished
    assert plan.reward_table("a").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pictures_that_nobody_wants_are_not_decoded(monkeypatch):
    monkeypatch.setattr(rollout.ray, "get", lambda ref: ref)
    plan = RolloutPlan(units(2), 4, {}, [], record=False, keep_pictures=7)
    wanted, sampler = [], slot("sampler")
    while (call := plan.next_call(sampler)) is not None:
        if call.method == "denoise_branches":
            decode = call.requests[0].args[-2]
            wanted.append((*call.work.leaves.key, call.work.leaves.high, decode))
        plan.done(call, sampler, *answer(call))
    assert plan.finished and plan.held == 0
    assert sorted(wanted) == [
        *((0, 0, 4, True), (0, 4, 6, True)),
        *((1, 0, 4, True), (1, 4, 6, False)),
    ]
    assert sorted(plan.pictures) == [(0, 0), (0, 4), (1, 0)]


def test_a_trajectory_that_is_made_again_needs_no_picture():
    plan, sampler = RolloutPlan(units(1), 6, SCORERS, ["a", "c"], record=True), slot("sampler")
    drive(plan)
    plan.again([(0, 0)])
    assert plan.next_call(sampler).requests[0].args[-2] is False
