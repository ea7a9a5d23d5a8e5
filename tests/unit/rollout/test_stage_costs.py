"""Shares, bytes and memory of a stage."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from b2ray.rollout.stage import UpdateResult
from b2ray.rollout.stage_costs import counters, memory_peaks, unet_shares


def update(seconds: float, unet_seconds: float) -> UpdateResult:
    return UpdateResult(6, {"policy/rows": 12.0}, 24, seconds, unet_seconds)


def test_a_share_is_of_all_processes_of_a_role():
    rollout = SimpleNamespace(seconds=10.0, unet_seconds=12.0, samplers=2)
    shares = unet_shares(rollout, update(4.0, 9.0), ranks=3)
    assert shares["time/unet_share_sampler"] == pytest.approx(0.6)
    assert shares["time/unet_share_learner"] == pytest.approx(0.75)


def test_a_phase_without_time_has_no_share():
    rollout = SimpleNamespace(seconds=0.0, unet_seconds=0.0, samplers=0)
    assert unet_shares(rollout, update(0.0, 0.0), ranks=1) == {}


def test_memory_is_in_gib_by_role():
    peaks = memory_peaks({"learner": 2**30, "scorer judge": 2**29})
    assert peaks == {"memory/learner": 1.0, "memory/scorer_judge": 0.5}


def test_counters_are_work_and_bytes_through_the_object_store():
    rollout = SimpleNamespace(
        unet_evals=100, bytes_moved={"prefixes": 5, "pictures": 7}, recorded=3
    )
    lora, optimizer = {"a": np.zeros(4, "f4")}, {"a/exp_avg": np.zeros(4, "f4")}
    assert counters(8, rollout, update(1.0, 1.0), (lora, optimizer)) == {
        "cost/reward_queries": 8.0,
        "cost/unet_evals": 124.0,
        "cost/unet_backwards": 12.0,
        "cost/trained_leaves": 6.0,
        "cost/bytes_prefixes": 5.0,
        "cost/bytes_pictures": 7.0,
        "cost/bytes_learnt": 3.0,
        "cost/bytes_weights": 32.0,
    }
