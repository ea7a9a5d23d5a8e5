"""The graph of a rollout: every leaf is scored once by every role, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from b2ray.actors.worker import Receipt
from b2ray.branching import Group, WorkUnit
from b2ray.diffusion.noise import Domain
from b2ray.fleet import rollout
from b2ray.fleet.rollout import BRANCHES, PREFIXES, Rollout
from b2ray.trees import FORK

SCORERS = {"scorer": ["a", "b"], "scorer c": ["c"]}


def units(count: int = 3) -> list[WorkUnit]:
    return [
        WorkUnit(0, Domain.TRAIN, 0, 0, u, (Group(2 * u, "p"), Group(2 * u + 1, "q")), 3, 1)
        for u in range(count)
    ]


def slot(role: str, index: int = 0, version: int = 0) -> SimpleNamespace:
    return SimpleNamespace(role=SimpleNamespace(name=role), index=index, version=version)


def answer(call):
    """What a sound actor answers: a receipt and refs; scores tell which leaf they are of."""
    low, high = call.leaves
    if call.method in PREFIXES:
        return Receipt("sampler", "", 0, 0.0, 2), [f"prefix {call.unit.index}"]
    if call.method in BRANCHES:
        refs = [f"leaf {call.unit.index} {leaf}" for leaf in range(low, high)]
        small = {}
        if call.method == "denoise_branches" and len(call.args) > 6:
            wanted = [(g, k) for g, k in call.unit.leaves(low, high) if g < call.args[6]]
            small = {leaf: f"{call.unit.index} {leaf}" for leaf in wanted}
            small |= {(g, FORK): f"{call.unit.index} fork {g}" for g, k in wanted if k == 0}
        apart = [leaf / 8 for leaf in range(low, high)]
        more = {"apart": apart} if call.method == "follow_demonstrations" else {"small": small}
        return Receipt("sampler", "", 0, 0.0, high - low, more), [object(), *refs]
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
        if lost[key] < 2 and chance.random() < losses:
            lost[key] += 1
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


def test_prefixes_that_are_there_already_are_gathered():
    plan = Rollout(units(2), 4, SCORERS, ["a"], record=True, kept={1: ["p2", "p3"]})
    calls = [plan.next_call(slot("sampler", j)) for j in range(2)]
    assert [(c.method, c.unit.index, c.args[1:]) for c in calls] == [
        ("denoise_prefix", 0, ()),
        ("gather_prefixes", 1, ("p2", "p3")),
    ]
    plan.lost(calls[1])
    assert plan.next_call(slot("sampler", 1)).args == calls[1].args
    plan = Rollout(units(2), 4, SCORERS, ["a"], record=True, kept={0: ["p0"], 1: ["p2"]})
    drive(plan, losses=0.3)
    assert plan.leaf(3, 2) == "leaf 1 5"


def test_pictures_of_the_first_leaves_are_kept(monkeypatch):
    plan = Rollout(units(2), 4, SCORERS, ["a", "c"], record=False, keep_pictures=7)
    monkeypatch.setattr(rollout.ray, "get", lambda ref: ref)
    drive(plan)
    assert sorted(plan.pictures) == [(0, 0), (0, 4), (1, 0)]


@pytest.mark.parametrize("losses", [0.0, 0.3])
@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_small_pictures_of_the_first_groups_are_kept(losses, count):
    """Groups are counted over all units, of two groups each; a call has leaves of both."""
    plan = Rollout(units(), 4, SCORERS, ["a"], record=True, trees=count)
    drive(plan, losses)
    assert plan.small == {
        (g, k): f"{g // 2} fork {g % 2}" if k == FORK else f"{g // 2} {(g % 2, k)}"
        for g in range(min(count, 6))
        for k in (FORK, 0, 1, 2)
    }


@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_lost_leaves_are_branched_again_and_not_scored_again(losses):
    counted: list[int] = []
    plan = Rollout(units(), 4, SCORERS, ["a", "c"], record=True, progress=counted.append)
    drive(plan)
    kept = [(0, 1), (3, 2), (5, 0)]
    plan.keep(kept)
    assert len(plan.trajectories) == 3
    for group, branch in kept[1:]:
        plan.trajectories[plan._place(group, branch)] = "gone"
    plan.again(kept[1:])
    assert not plan.finished
    drive(plan, losses)
    assert [plan.leaf(*leaf) for leaf in kept] == ["leaf 0 1", "leaf 1 5", "leaf 2 3"]
    assert sum(counted) == 18


def test_samplers_pause_while_the_scorers_are_behind(monkeypatch):
    monkeypatch.setattr(rollout, "MOST_UNSCORED", 2)
    plan, sampler = Rollout(units(9), 4, SCORERS, ["a", "c"], record=True), slot("sampler")
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
    plan, first, second = Rollout(units(3), 2, SCORERS, ["a"], record=True), *two()
    opening = [plan.next_call(first), plan.next_call(second)]
    assert [c.method for c in opening if c] == ["denoise_prefix"] * 2
    for call, sampler in zip(opening, (first, second), strict=True):
        plan.done(call, sampler, *answer(call))
    third = plan.next_call(first)
    assert third is not None and third.method == "denoise_prefix" and third.unit.index == 2
    # The second goes on with its own prefix, then with the first's.
    followed = [plan.next_call(second) for _ in range(4)]
    assert [c.unit.index for c in followed if c] == [1, 1, 1, 0]


def two() -> tuple[SimpleNamespace, SimpleNamespace]:
    return slot("sampler", 0), slot("sampler", 1)


def test_what_is_held_is_counted():
    plan = Rollout(units(1), 6, SCORERS, ["a"], record=True)
    sampler, scorer = slot("sampler"), slot("scorer")

    def step(who: SimpleNamespace, **values: int) -> None:
        call = plan.next_call(who)
        receipt, results = answer(call)
        plan.done(call, who, replace(receipt, values={**receipt.values, **values}), results)

    step(sampler, bytes=100)
    step(sampler, bytes=600, picture_bytes=50)
    assert plan.held == 750
    step(scorer)
    assert plan.finished and plan.held == 700
    plan.keep([(0, 0), (1, 1)])
    assert plan.held == 300


def test_samplers_at_another_version_get_nothing():
    plan = Rollout(units(1), 4, SCORERS, ["a"], record=True)
    assert plan.next_call(slot("sampler", version=1)) is None
    assert plan.next_call(slot("sampler", version=0)) is not None


# --- demonstrations and what is not scored ---------------------------------------------------


def shown(tmp_path, count: int = 2) -> list[WorkUnit]:
    """Work units of five demonstrations, after those of `units`."""
    (tmp_path / "a.png").write_bytes(b"picture")
    groups = tuple(Group(g, "p", str(tmp_path / "a.png")) for g in range(5))
    return [WorkUnit(0, Domain.DEMONSTRATE, 0, 0, 3 + u, groups, 1, 1) for u in range(count)]


@pytest.mark.parametrize("losses", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_demonstrations_are_followed_beside_the_own(tmp_path, losses, seed):
    counted: list[int] = []
    work = [*units(), *shown(tmp_path)]
    plan = Rollout(work, 4, {}, [], record=True, progress=counted.append)
    drive(plan, losses, seed)
    assert sum(counted) == 18 + 10
    assert len(plan.trajectories) == 28
    # Groups are counted over all units: six of three branches, then ten of one.
    assert (plan.leaf(5, 2), plan.leaf(6, 0), plan.leaf(15, 0)) == (
        *("leaf 2 5", "leaf 3 0", "leaf 4 4"),
    )
    assert plan.apart == {(u, leaf): leaf / 8 for u in (3, 4) for leaf in range(5)}


@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_lost_demonstrations_are_made_again(tmp_path, losses):
    plan = Rollout([*units(), *shown(tmp_path)], 4, {}, [], record=True)
    drive(plan)
    kept = [(0, 1), (7, 0), (15, 0)]
    plan.keep(kept)
    for group, branch in kept[1:]:
        plan.trajectories[plan._place(group, branch)] = "gone"
    plan.again(kept[1:])
    assert not plan.finished
    drive(plan, losses)
    assert [plan.leaf(*leaf) for leaf in kept] == ["leaf 0 1", "leaf 3 1", "leaf 4 4"]


def test_a_call_has_the_files_and_only_own_leaves_are_scored(tmp_path):
    plan = Rollout([*units(1), *shown(tmp_path, 1)], 8, SCORERS, ["a"], record=True)
    calls, sampler = [], slot("sampler")
    while (call := plan.next_call(sampler)) is not None:
        calls.append(call)
        plan.done(call, sampler, *answer(call))
    found = {call.method: call for call in calls}
    assert found["encode_demonstrations"].args[1] == [b"picture"] * 5
    assert found["follow_demonstrations"].args[1:] == ("prefix 3", 0, 5)
    assert found["denoise_branches"].args[-1] is True  # its pictures are wanted
    scored = plan.next_call(slot("scorer"))
    assert scored.unit.index == 0 and plan.next_call(slot("scorer")) is None
    plan.done(scored, slot("scorer"), *answer(scored))
    assert plan.finished
    assert plan.reward_table("a").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pictures_that_nobody_wants_are_not_decoded(monkeypatch):
    monkeypatch.setattr(rollout.ray, "get", lambda ref: ref)
    plan = Rollout(units(2), 4, {}, [], record=False, keep_pictures=7)
    wanted, sampler = [], slot("sampler")
    while (call := plan.next_call(sampler)) is not None:
        if call.method == "denoise_branches":
            wanted.append((call.unit.index, call.leaves, call.args[-1]))
        plan.done(call, sampler, *answer(call))
    assert plan.finished and plan.held == 0
    assert sorted(wanted) == [
        *((0, (0, 4), True), (0, (4, 6), True)),
        *((1, (0, 4), True), (1, (4, 6), False)),
    ]
    assert sorted(plan.pictures) == [(0, 0), (0, 4), (1, 0)]


def test_a_trajectory_that_is_made_again_needs_no_picture():
    plan, sampler = Rollout(units(1), 6, SCORERS, ["a", "c"], record=True), slot("sampler")
    drive(plan)
    plan.again([(0, 0)])
    assert plan.next_call(sampler).args[-1] is False
