"""Giving up: after how many failures, and with which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from b2ray.actors.messages import Request
from b2ray.config import Fleet
from b2ray.errors import WorkerError
from b2ray.fleet import budgets as module
from b2ray.fleet.budgets import Budgets, Failure
from b2ray.fleet.slots import Call


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


class Slot(SimpleNamespace):
    def __str__(self) -> str:
        return self.name


def slot(name: str = "sampler 1") -> Slot:
    return Slot(name=name, failures=0, not_before=0.0)


def failure(cause: str) -> Failure:
    return Failure("sampler 1", "host (pid 7, node ab)", "denoising unit 3", cause, "/logs/7.err")


def call(doing: str = "denoising unit 3") -> Call:
    return Call("sampler", [Request("denoise_prefix", ())], doing)


def test_deaths_in_a_row_end_with_the_first_cause(clock):
    budgets, mine = Budgets(Fleet(retries=2)), slot()
    budgets.died(mine, failure("out of memory"), preempted=False)
    budgets.died(mine, failure("connection lost"), preempted=False)
    with pytest.raises(WorkerError) as caught:
        budgets.died(mine, failure("connection lost"), preempted=False)
    words = str(caught.value)
    assert words.startswith(
        "sampler 1 on host (pid 7, node ab) failed while denoising unit 3: out of memory"
    )
    assert "first of 3 deaths in a row" in words and "log: /logs/7.err" in words


def test_work_that_is_done_starts_the_count_again(clock):
    budgets, mine = Budgets(Fleet(retries=1)), slot()
    for _ in range(5):
        budgets.died(mine, failure("killed"), preempted=False)
        budgets.worked(mine, call())
    assert mine.failures == 0


def test_pauses_grow_up_to_half_a_minute(clock):
    budgets, mine, work = Budgets(Fleet(retries=9)), slot(), call()
    pauses, waits = [], []
    for _ in range(8):
        budgets.died(mine, failure("killed"), preempted=False)
        budgets.again(work, failure("killed"))
        pauses.append(mine.not_before - clock[0])
        waits.append(work.not_before - clock[0])
    assert pauses == waits == [0, 1, 2, 4, 8, 16, 30, 30]


def test_work_has_a_budget_of_its_own_whoever_fails_at_it(clock):
    budgets = Budgets(Fleet(retries=2))
    for _ in range(2):
        budgets.again(call(), failure("lost"))
    budgets.again(call("another"), failure("lost"))
    with pytest.raises(WorkerError, match="first of 3 failures of this work"):
        budgets.again(call(), failure("lost"))


def test_many_deaths_in_a_window_end_the_run(clock):
    budgets = Budgets(Fleet(retries=9, max_deaths=3, death_window=60))
    for i in range(3):
        budgets.died(slot(f"sampler {i}"), failure(f"cause {i}"), preempted=False)
    with pytest.raises(WorkerError, match=r"cause 0 \(the first of 4 in 60 s, fleet\.max_deaths"):
        budgets.died(slot("sampler 9"), failure("cause 9"), preempted=False)


def test_deaths_that_are_long_ago_do_not_count(clock):
    budgets = Budgets(Fleet(retries=9, max_deaths=3, death_window=60))
    for i in range(12):
        budgets.died(slot(f"sampler {i}"), failure("killed"), preempted=False)
        clock[0] += 25
    budgets.died(slot("sampler 12"), failure("killed"), preempted=False)  # the third in 60 s
    with pytest.raises(WorkerError, match="the first of 4 in 60 s"):
        budgets.died(slot("sampler 13"), failure("killed"), preempted=False)


def test_nodes_that_are_taken_away_have_their_own_budget(clock):
    budgets, mine = Budgets(Fleet(retries=0, max_deaths=1, max_preemptions=5)), slot()
    for _ in range(5):
        budgets.died(mine, failure("preempted"), preempted=True)
    assert mine.failures == 0
    with pytest.raises(WorkerError, match=r"fleet\.max_preemptions is 5"):
        budgets.died(mine, failure("preempted"), preempted=True)
