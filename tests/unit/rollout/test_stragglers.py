"""At the end of a stage slow samplers leave the last calls to fast ones."""

from __future__ import annotations

import pytest

from b2ray.rollout import stragglers as module
from b2ray.rollout.stragglers import Stragglers


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def samplers(clock):
    """Sampler 0 needs 1 s a leaf, sampler 1 needs 4 s."""
    found = Stragglers()
    found.done(0, 2, 2.0)
    found.done(1, 2, 8.0)
    return found


def test_a_slow_sampler_leaves_the_last_call_to_a_fast_one(samplers):
    samplers.sent(0, 2)  # until 102; the next call would end at 104, on the slow one at 108
    assert not samplers.should_take(1, 1, 2)
    assert samplers.should_take(0, 1, 2)


def test_it_takes_its_share_while_there_is_enough(samplers):
    samplers.sent(0, 2)
    assert samplers.should_take(1, 4, 2)  # 104, 106 and 108 on the fast one, 108 on the slow one
    assert not samplers.should_take(1, 2, 2)


def test_nobody_waits_for_one_that_is_overdue(samplers, clock):
    samplers.sent(0, 2)
    clock[0] = 103.9
    assert not samplers.should_take(1, 1, 2)
    clock[0] = 104.1  # a whole call late
    assert samplers.should_take(1, 1, 2)


def test_one_that_was_never_seen_counts_as_the_median(samplers):
    assert samplers.should_take(2, 1, 2)
    assert Stragglers().should_take(0, 1, 20)
