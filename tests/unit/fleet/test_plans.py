"""Calls of the learner, and what happens when their inputs are lost."""

from __future__ import annotations

import pytest
import ray

from b2ray.actors.worker import Receipt
from b2ray.fleet import plans as module
from b2ray.fleet.plans import LearnerCall, OnEach, Update
from b2ray.fleet.rollout import Rollout
from b2ray.replay import Kept
from tests.unit.fleet.test_rollout import SCORERS, answer, drive, slot, units

SELECTED = [("p", 1.0, (0, 1)), ("p", -1.0, (0, 2)), ("q", 0.5, (3, 2))]


@pytest.fixture
def rollout():
    plan = Rollout(units(), 4, SCORERS, ["a"], record=True)
    drive(plan)
    plan.keep(leaf for _, _, leaf in SELECTED)
    return plan


@pytest.fixture(autouse=True)
def objects(objects, monkeypatch):
    """Lost refs, also by what the fleet's nodes say."""
    monkeypatch.setattr(module.nodes, "lost", lambda refs: [ref in objects for ref in refs])
    return objects


def test_an_update_is_sent_once_with_its_leaves_in_order(rollout):
    taken = []
    plan = Update(4, 2, rollout, SELECTED, 0, lambda receipt, results: taken.append(results))
    assert plan.next_call(slot("sampler")) is None
    call = plan.next_call(slot("learner"))
    refs = ["leaf 0 1", "leaf 0 2", "leaf 1 5"]
    entries = [(p, a, 2, r) for (p, a, _), r in zip(SELECTED, refs, strict=True)]
    assert call.args == (4, entries, 0, [])
    assert plan.next_call(slot("learner")) is None
    plan.done(call, slot("learner"), Receipt("learner", "", 5, 0.0), ["lora", "optimizer"])
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
    assert again.method == "denoise_branches" and again.unit.index == 1 and again.leaves == (4, 6)
    rollout.done(again, slot("sampler"), Receipt("sampler", "", 0, 0.1), ["p", "new 4", "new 5"])
    refs = [ref for *_, ref in plan.next_call(slot("learner")).args[1]]
    assert refs == ["leaf 0 1", "leaf 0 2", "new 5"]
    assert versions == [7, 0, 7]


def test_all_leaves_are_made_again_if_nobody_knows_which_are_lost(rollout):
    """A node that was lost a moment ago still counts as alive."""
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *_: None)
    plan.lost(plan.next_call(slot("learner")))
    again = [rollout.next_call(slot("sampler")) for _ in range(3)]
    assert {(c.unit.index, c.leaves) for c in again if c} == {(0, (0, 4)), (1, (4, 6))}


OLD = Kept(3, "r", 2.0, 1, "old 3")


def test_what_is_replayed_follows_the_stages_own_and_is_never_made_again(rollout):
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *_: None, replayed=[OLD])
    for _ in range(2):
        call = plan.next_call(slot("learner"))
        assert len(call.args[1]) == 3 and call.args[3] == [OLD]
        plan.lost(call)  # nobody knows what is lost: all of the stage's own
        while (again := rollout.next_call(slot("sampler"))) is not None:
            rollout.done(again, slot("sampler"), *answer(again))


def left(*leaves: tuple[int, int]) -> list[Kept]:
    """Leaves of stage 4, to be trained on again."""
    return [Kept(4, "p", 1.0, 2, leaf) for leaf in leaves]


def test_what_is_kept_becomes_the_drivers_own(rollout):
    keep = [OLD, *left((0, 1), (3, 2))]
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *_: None, replayed=[OLD], keep=keep)
    call = plan.next_call(slot("learner"))
    plan.done(call, slot("learner"), Receipt("learner", "", 5, 0.0), ["lora", "optimizer"])
    assert [k.trajectory for k in plan.kept] == [
        *("old 3", "own value of leaf 0 1", "own value of leaf 1 5")
    ]
    assert plan.kept[0] == OLD and [k.stage for k in plan.kept] == [3, 4, 4]


def test_a_leaf_to_be_kept_that_goes_after_the_update_is_made_again(rollout, objects):
    """The learner had it; nothing is taken before the driver has it, too."""
    taken = []
    plan = Update(4, 2, rollout, SELECTED, 0, lambda *a: taken.append(a), keep=left((3, 2)))
    call, receipt = plan.next_call(slot("learner")), Receipt("learner", "", 5, 0.0)
    objects.add("leaf 1 5")
    with pytest.raises(ray.exceptions.ObjectLostError):
        plan.done(call, slot("learner"), receipt, ["lora", "optimizer"])
    assert not plan.finished and not taken
    plan.lost(call)
    again = rollout.next_call(slot("sampler"))
    assert (again.unit.index, again.leaves) == (1, (4, 6))
    rollout.done(again, slot("sampler"), Receipt("sampler", "", 0, 0.1), ["p", "new 4", "new 5"])
    call = plan.next_call(slot("learner"))
    plan.done(call, slot("learner"), receipt, ["lora", "optimizer"])
    assert plan.finished and [k.trajectory for k in plan.kept] == ["own value of new 5"]


def test_it_waits_out_the_pause_that_it_was_given(objects, monkeypatch):
    plan = LearnerCall("state", (), "reading")
    call = plan.next_call(slot("learner"))
    call.not_before = 50.0
    plan.lost(call)
    monkeypatch.setattr(module.time, "monotonic", lambda: 49.9)
    assert plan.next_call(slot("learner")) is None
    monkeypatch.setattr(module.time, "monotonic", lambda: 50.0)
    assert plan.next_call(slot("learner")) is not None


def test_an_answer_that_is_lost_on_the_way_is_asked_for_again(objects):
    plan = LearnerCall("state", (), "reading")
    call = plan.next_call(slot("learner"))
    objects.add("lora")
    with pytest.raises(ray.exceptions.ObjectLostError):
        plan.done(call, slot("learner"), Receipt("learner", "", 0, 0.0), ["lora", "optimizer"])
    assert not plan.finished
    plan.lost(call)
    assert plan.next_call(slot("learner")) is not None


class Place:
    """A slot as the dispatcher has them: each is itself alone."""

    def __init__(self, role: str) -> None:
        self.role = slot(role).role


def test_a_call_on_each_slot_is_sent_once_to_each_of_the_role():
    plan = OnEach("sampler", 2, "time_call", (8, False), "timing")
    first, second = Place("sampler"), Place("sampler")
    assert plan.next_call(Place("learner")) is None
    call = plan.next_call(first)
    assert (call.method, call.args, call.results) == ("time_call", (8, False), 1)
    assert plan.next_call(first) is None
    plan.done(call, first, Receipt("sampler", "", 0, 0.1), [])
    assert plan.next_call(first) is None and not plan.finished
    plan.done(plan.next_call(second), second, Receipt("sampler", "", 0, 0.3), [])
    assert plan.finished and [r.seconds for r in plan.receipts] == [0.1, 0.3]


def test_an_answer_that_is_lost_is_asked_for_again():
    plan = OnEach("learner", 1, "time_call", (8, True), "timing")
    only = Place("learner")
    plan.lost(plan.next_call(only))
    assert plan.next_call(only) is not None and not plan.finished
