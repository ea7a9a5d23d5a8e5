"""Shares, bytes and memory of a stage."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from b2ray import spent


def test_a_share_is_of_all_processes_of_a_role():
    sampled = SimpleNamespace(seconds=10.0, unet_seconds=12.0, samplers=2)
    learnt = SimpleNamespace(seconds=4.0, unet_seconds=9.0)
    found = spent.shares(sampled, learnt, ranks=3)
    assert found["time/unet_share_sampler"] == pytest.approx(0.6)
    assert found["time/unet_share_learner"] == pytest.approx(0.75)


def test_what_did_nothing_has_no_share():
    nothing = SimpleNamespace(seconds=0.0, unet_seconds=0.0, samplers=0)
    assert spent.shares(nothing, nothing, ranks=1) == {}


def test_memory_is_in_gib_by_role():
    found = spent.peaks({"learner": 2**30, "scorer judge": 2**29})
    assert found == {"memory/learner": 1.0, "memory/scorer_judge": 0.5}


def test_bytes_are_what_went_through_the_store():
    lora, optimizer = {"a": np.zeros(4, "f4")}, {"a/exp_avg": np.zeros(4, "f4")}
    found = spent.moved({"prefixes": 5, "pictures": 7}, 3, (lora, optimizer))
    assert found == {
        "cost/bytes_prefixes": 5.0,
        "cost/bytes_pictures": 7.0,
        "cost/bytes_learnt": 3.0,
        "cost/bytes_weights": 32.0,
    }
