"""How long UNet calls take: what is called, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch

from b2ray.diffusion import lora
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.timing import REPEATS, time_call
from tests.models import config


@pytest.fixture(scope="module")
def policy(models):
    found = Policy(config(models), torch.device("cpu"))
    found.prepare(["a red circle", "a blue square"])
    return found


@pytest.mark.parametrize("backward", [False, True])
def test_a_call_is_a_guided_evaluation_of_so_many_latents(policy, monkeypatch, backward):
    before, graded = policy.unet_evals, []
    predict = policy.predict
    monkeypatch.setattr(
        policy, "predict", lambda *a: graded.append(torch.is_grad_enabled()) or predict(*a)
    )
    weights = policy.lora_state()
    assert time_call(policy, 3, backward) > 0
    assert policy.unet_evals - before == 3 * (1 + REPEATS)
    assert graded == [backward] * (1 + REPEATS)
    assert all((policy.lora_state()[n] == w).all() for n, w in weights.items())
    assert all(p.grad is None for p in lora.parameters(policy.pipeline.unet).values())


def test_a_call_without_memory_takes_no_time(policy, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy, "predict", full)
    assert time_call(policy, 3, True) is None
