"""The clock of the UNet's work."""

from __future__ import annotations

import time

import pytest
import torch

from b2ray.diffusion.clock import Clock
from b2ray.diffusion.policy import Policy
from tests.models import PROMPTS, config


def test_it_runs_only_inside(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock:
            pass
    assert clock.seconds == pytest.approx(2.5)


def test_a_call_that_fails_stops_it():
    clock = Clock(torch.device("cpu"))
    with pytest.raises(KeyError), clock:
        raise KeyError
    before = clock.seconds
    assert clock.seconds == before


def test_a_policys_clock_runs_in_the_unet(models):
    policy = Policy(config(models), torch.device("cpu"))
    policy.prepare(PROMPTS)
    assert policy.clock.seconds == 0
    x = torch.randn(2, *policy.latent_shape)
    with torch.no_grad():
        policy.predict(torch.tensor([0, 1]), x, PROMPTS[:2])
    seen = policy.clock.seconds
    assert seen > 0
    policy.decode(x)
    assert policy.clock.seconds == seen
