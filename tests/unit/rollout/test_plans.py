"""The update's call, and what happens when its inputs are lost."""

from __future__ import annotations

import pytest
import ray

from b2ray.actors.messages import BranchesMade, Receipt, Updated
from b2ray.algorithm.branching import SelectedLeaf
from b2ray.algorithm.replay import ReplayEntry
from b2ray.rollout import plans as module
from b2ray.rollout.plans import Update
from b2ray.rollout.rollout import RolloutPlan
from tests.unit.rollout.test_rollout import SCORERS, answer, drive, slot, units

SELECTED = [
    SelectedLeaf("p", 1.0, 0, 1),
    SelectedLeaf("p", -1.0, 0, 2),
    SelectedLeaf("q", 0.5, 3, 2),
]
UPDATED = Updated(Receipt("learner", "", 5, 0.0), "digest", {})
BRANCHED = BranchesMade(Receipt("sampler", "", 0, 0.1))


@pytest.fixture
def rollout():
    plan = RolloutPlan(units(), 4, SCORERS, ["a"], record=True)
    drive(plan)
    plan.keep((leaf.group, leaf.branch) for leaf in SELECTED)
    return plan


@pytest.fixture(autouse=True)
def objects(objects, monkeypatch):
    """Lost refs, also by what the fleet's nodes say."""
    monkeypatch.setattr(module.nodes, "lost", lambda refs: [ref in objects for ref in refs])
    return objects


def place(call) -> tuple[int, int, int]:
    """Unit index and leaves of a call."""
    return call.work.unit.index, call.work.leaves.low, call.work.leaves.high


def test_an_update_is_sent_once_with_its_leaves_in_order(rollout):
    taken = []
    plan = Update(4, 2, rollout, SELECTED, 0, lambda answer, results: taken.append(results))
    assert plan.next_call(slot("sampler")) is None
    call = plan.next_call(slot("learner"))
    refs = ["leaf 0 1", "leaf 0 2", "leaf 1 5"]
    entries = [(x.prompt, x.advantage, 2, r) for x, r in zip(SELECTED, refs, strict=True)]
    assert call.requests[0].args == (4, entries, 0, [])
    assert (call.method, call.requests[0].objects) == ("update", 2)
    assert plan.next_call(slot("learner")) is None
    plan.done(call, slot("learner"), UPDATED, ["lora", "optimizer"])
    assert plan.finished and taken == [["value of lora", "value of optimizer"]]


def test_lost_leaves_are_made_again_before_the_update_is(rollout, objects):
    versions: list[int] = []
    plan = Update(
        4, 2, rollout, SELECTED, 1, lambda *_: None, sample_from=versions.append, meanwhile=7
    )
    call = plan.next_call(slot("learner"))
    objects.add("leaf 1 5")
    plan.lost(call)
    assert versions == [7, 0]
    assert not rollout.finished and plan.next_call(slot("learner")) is None
    again = rollout.next_call(slot("sampler"))
    assert again.method == "denoise_branches" and place(again) == (1, 4, 6)
    rollout.done(again, slot("sampler"), BRANCHED, ["p", "new 4", "new 5"])
    refs = [ref for *_, ref in plan.next_call(slot("learner")).requests[0].args[1]]
    assert refs == ["leaf 0 1", "leaf 0 2", "new 5"]
    assert versions == [7, 0, 7]


def test_all_leaves_are_made_again_if_nobody_knows_which_are_lost(rollout):
    """A node that was lost a moment ago still counts as alive."""
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *_: None)
    plan.lost(plan.next_call(slot("learner")))
    again = [rollout.next_call(slot("sampler")) for _ in range(3)]
    assert {place(c) for c in again if c} == {(0, 0, 4), (1, 4, 6)}


OLD = ReplayEntry(3, "r", 2.0, 1, "old 3")


def test_what_is_replayed_follows_the_stages_own_and_is_never_made_again(rollout):
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *_: None, replayed=[OLD])
    for _ in range(2):
        call = plan.next_call(slot("learner"))
        assert len(call.requests[0].args[1]) == 3 and call.requests[0].args[3] == [OLD]
        plan.lost(call)  # nobody knows what is lost: all of the stage's own
        while (again := rollout.next_call(slot("sampler"))) is not None:
            rollout.done(again, slot("sampler"), *answer(again))


def left(*leaves: tuple[int, int]) -> list[ReplayEntry]:
    """Leaves of stage 4, to be replayed."""
    return [ReplayEntry(4, "p", 1.0, 2, leaf) for leaf in leaves]


def test_what_is_kept_becomes_the_drivers_own(rollout):
    keep = [OLD, *left((0, 1), (3, 2))]
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *_: None, replayed=[OLD], keep=keep)
    call = plan.next_call(slot("learner"))
    plan.done(call, slot("learner"), UPDATED, ["lora", "optimizer"])
    assert [k.trajectory for k in plan.replay] == [
        *("old 3", "own value of leaf 0 1", "own value of leaf 1 5")
    ]
    assert plan.replay[0] == OLD and [k.stage for k in plan.replay] == [3, 4, 4]


def test_a_leaf_to_be_kept_that_goes_after_the_update_is_made_again(rollout, objects):
    """The learner had it; nothing is taken before the driver has it, too."""
    taken = []
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *a: taken.append(a), keep=left((3, 2)))
    call = plan.next_call(slot("learner"))
    objects.add("leaf 1 5")
    with pytest.raises(ray.exceptions.ObjectLostError):
        plan.done(call, slot("learner"), UPDATED, ["lora", "optimizer"])
    assert not plan.finished and not taken
    plan.lost(call)
    again = rollout.next_call(slot("sampler"))
    assert place(again) == (1, 4, 6)
    rollout.done(again, slot("sampler"), BRANCHED, ["p", "new 4", "new 5"])
    call = plan.next_call(slot("learner"))
    plan.done(call, slot("learner"), UPDATED, ["lora", "optimizer"])
    assert plan.finished and [k.trajectory for k in plan.replay] == ["own value of new 5"]
