"""Plans of one call, and of one call on each slot: sent once, and again when an answer is lost."""

from __future__ import annotations

import pytest
import ray

from b2ray.actors.learner import Learner
from b2ray.actors.messages import Answer, CallTimed, Receipt, request
from b2ray.actors.worker import Worker
from b2ray.fleet import plans as module
from b2ray.fleet.plans import OnEach, SingleCall
from tests.unit.rollout.test_rollout import slot

READ = Answer(Receipt("learner", "", 0, 0.0))


def state() -> SingleCall:
    return SingleCall("learner", request(Learner.state), "reading")


def test_it_waits_out_the_pause_that_it_was_given(objects, monkeypatch):
    plan = state()
    call = plan.next_call(slot("learner"))
    call.not_before = 50.0
    plan.lost(call)
    monkeypatch.setattr(module.time, "monotonic", lambda: 49.9)
    assert plan.next_call(slot("learner")) is None
    monkeypatch.setattr(module.time, "monotonic", lambda: 50.0)
    assert plan.next_call(slot("learner")) is not None


def test_an_answer_that_is_lost_on_the_way_is_asked_for_again(objects):
    plan = state()
    call = plan.next_call(slot("learner"))
    objects.add("lora")
    with pytest.raises(ray.exceptions.ObjectLostError):
        plan.done(call, slot("learner"), READ, ["lora", "optimizer"])
    assert not plan.finished
    plan.lost(call)
    assert plan.next_call(slot("learner")) is not None


class Place:
    """A slot as the dispatcher has them: each is itself alone."""

    def __init__(self, role: str) -> None:
        self.role = slot(role).role


def test_a_call_on_each_slot_is_sent_once_to_each_of_the_role():
    plan = OnEach("sampler", 2, request(Worker.time_call, 8, False), "timing")
    first, second = Place("sampler"), Place("sampler")
    assert plan.next_call(Place("learner")) is None
    call = plan.next_call(first)
    assert call.requests == [request(Worker.time_call, 8, False)]
    assert (call.method, call.requests[0].objects) == ("time_call", 0)
    assert plan.next_call(first) is None
    plan.done(call, first, CallTimed(Receipt("sampler", "", 0, 0.1), 0.1), [])
    assert plan.next_call(first) is None and not plan.finished
    plan.done(plan.next_call(second), second, CallTimed(Receipt("sampler", "", 0, 0.3), 0.3), [])
    assert plan.finished and [a.seconds for a in plan.answers] == [0.1, 0.3]


def test_an_answer_that_is_lost_is_asked_for_again():
    plan = OnEach("learner", 1, request(Worker.time_call, 8, True), "timing")
    only = Place("learner")
    plan.lost(plan.next_call(only))
    assert plan.next_call(only) is not None and not plan.finished
