"""Making prefixes that serve in several stages, and keeping them."""

from __future__ import annotations

import pytest
import ray

from b2ray.actors.worker import Receipt
from b2ray.branching import work_units
from b2ray.fleet.prefixes import Making, Prefixes
from b2ray.prompts import PromptSet
from tests.unit.fleet.test_rollout import slot
from tests.unit.test_prefixes import PROMPTS, config

pytestmark = pytest.mark.usefixtures("objects")


def units(shared: Prefixes, stage: int, version: int = 0, n: int = 8):
    return work_units(shared.config, shared.pool.groups(stage), stage, version, n)


def receipt(evals: int = 4) -> Receipt:
    return Receipt("sampler", "", 0, 0.0, evals)


def results(call):
    return [f"{call.unit.stage}/{g.index}" for g in call.unit.groups]


def drive(plan: Making) -> list:
    calls = []
    while not plan.finished:
        calls.append(plan.next_call(slot("sampler")))
        plan.done(calls[-1], slot("sampler"), receipt(), results(calls[-1]))
    return calls


def test_each_unit_is_made_once_by_a_sampler_of_its_version():
    shared = Prefixes(config(branching={"images": 21, "branches": 3, "unit_groups": 3}), PROMPTS)
    plan = shared.making(units(shared, 0, version=2), fork=12)
    assert plan.next_call(slot("sampler", version=1)) is None
    assert plan.next_call(slot("learner", version=2)) is None
    assert plan.began is None
    calls = [plan.next_call(slot("sampler", version=2)) for _ in range(4)]
    assert calls[3] is None and plan.began is not None
    # Kept down to the longest interval of the run, 19 of 20 steps.
    assert [c.args[1] for c in calls[:3]] == [1, 1, 1]
    assert [c.unit.fork for c in calls[:3]] == [12] * 3
    assert [c.results for c in calls[:3]] == [4, 4, 2]
    for call in calls[:3]:
        assert not plan.finished
        plan.done(call, slot("sampler"), receipt(), results(call))
    assert plan.finished and plan.unet_evals == 12
    assert plan.made == {(0, j): f"own value of 0/{j}" for j in range(7)}


def test_what_is_lost_before_the_driver_has_it_is_made_again(objects):
    shared = Prefixes(config(), PROMPTS)
    plan = shared.making(units(shared, 0), fork=12)
    call = plan.next_call(slot("sampler"))
    objects.add("0/3")
    with pytest.raises(ray.exceptions.ObjectLostError):  # as the dispatcher catches it
        plan.done(call, slot("sampler"), receipt(), results(call))
    assert not plan.finished and plan.unet_evals == 0 and plan.made == {}
    plan.lost(call)
    objects.clear()
    (again,) = drive(plan)
    assert again.unit == call.unit and plan.unet_evals == 4


def test_a_later_stage_makes_only_what_it_lacks():
    shared = Prefixes(config(), PROMPTS)
    made = 0
    for stage in range(10):
        work = units(shared, stage, version=stage)
        plan, new = shared.making(work, 12), shared.pool.new(stage)
        assert (plan is None) == (not new)
        if plan is not None:
            (call,) = drive_version(plan, stage)
            assert [g.prefix for g in call.unit.groups] == [g.prefix for g in new]
            made += len(plan.made)
            shared.take(plan.made)
        kept = shared.of(work)
        assert kept == {
            u.index: [f"own value of {s}/{g}" for s, g in (x.prefix for x in u.groups)]
            for u in work
        }
    assert made == sum(len(shared.pool.new(s)) for s in range(10)) == 10  # two of each prompt


def drive_version(plan: Making, version: int) -> list:
    calls = []
    while not plan.finished:
        calls.append(plan.next_call(slot("sampler", version=version)))
        plan.done(calls[-1], slot("sampler"), receipt(), results(calls[-1]))
    return calls


def test_what_is_made_late_is_made_in_the_batches_of_its_own_stage():
    """Of a run that goes on without its file; in other batches they would round differently."""
    settings = config(branching={"images": 21, "branches": 3, "unit_groups": 2})
    first, later = Prefixes(settings, PROMPTS), Prefixes(settings, PROMPTS)
    then = {
        (u.stage, g.index): u.groups
        for stage in range(10)
        if (plan := first.making(units(first, stage), 12)) is not None
        for u in (c.unit for c in drive(plan))
        for g in u.groups
        if not first.take(plan.made)
    }
    work = units(later, 9, version=5, n=10)
    calls = drive_version(later.making(work, 10), 5)
    for call in calls:
        assert call.unit.version == 5 and call.unit.fork == 10
        for group in call.unit.groups:
            assert then[call.unit.stage, group.index] == call.unit.groups
    assert {g.prefix for u in work for g in u.groups} <= {
        (c.unit.stage, g.index) for c in calls for g in c.unit.groups
    }


def test_what_a_stage_made_is_committed_if_it_serves_again_and_then_forgotten():
    shared = Prefixes(config("reuse", 1), PROMPTS)
    for stage in range(10):
        plan = shared.making(units(shared, stage), 12)
        assert (plan is None) == (stage % 2 == 1)
        if plan is not None:
            drive(plan)
            shared.take(plan.made)
        expected = {(stage, j) for j in range(7)} if stage % 2 == 0 else set()
        assert shared.to_commit(stage).keys() == expected
        shared.forget(stage + 1)
        assert len(shared._refs) == len(expected)
    # Nothing comes after the last stage.
    last = Prefixes(config("base", curriculum={"stages": 1, "start": 6}), PROMPTS)
    plan = last.making(units(last, 0), 14)
    drive(plan)
    last.take(plan.made)
    assert last.to_commit(0) == {}


def test_units_that_make_their_own_prefixes_are_let_be():
    shared = Prefixes(config("current"), PromptSet(("a", "b")))
    work = units(shared, 3)
    assert shared.making(work, 12) is None and shared.of(work) == {}
    assert shared.to_commit(3) == {}


def test_a_rehearsal_makes_what_its_unit_needs_and_keeps_it_for_the_longest_interval():
    """`b2ray check` denoises prefixes as the first stage does, and forks as the last one."""
    settings = config("reuse", 1, branching={"images": 21, "branches": 3, "unit_groups": 3})
    shared = Prefixes(settings, PROMPTS)
    work = units(shared, 0, n=20)[:1]
    (call,) = drive(shared.making(work, fork=14))
    assert call.unit.groups == work[0].groups
    assert (call.unit.fork, call.args[1]) == (14, 0)
