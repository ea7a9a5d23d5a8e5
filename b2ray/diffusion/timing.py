"""Measured durations of UNet calls of different sizes on a device."""

from __future__ import annotations

import time

import torch

from b2ray.diffusion import lora
from b2ray.diffusion.policy import Policy

REPEATS = 2  # timed calls, of which the shortest counts; a warm-up call precedes them


def time_call(policy: Policy, rows: int, backward: bool) -> float | None:
    """Measure one guided UNet call, as sampling or learning makes it.

    Args:
        policy: a policy with at least one prompt prepared.
        rows: number of latents in the call.
        backward: whether the call includes the backward pass, as in learning.

    Returns:
        Seconds, or None if the device has too little memory for the call.
    """
    try:
        return min([_call(policy, rows, backward) for _ in range(1 + REPEATS)][1:])
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in lora.parameters(policy.pipeline.unet).values():
            parameter.grad = None
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()


def _call(policy: Policy, rows: int, backward: bool) -> float:
    step = torch.arange(rows, device=policy.device) % policy.schedule.steps
    x = torch.zeros(rows, *policy.latent_shape, device=policy.device, dtype=policy.dtype)
    prompts = [policy.known[j % len(policy.known)] for j in range(rows)]
    _synchronize(policy)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        output = policy.predict(step, x, prompts)
    if backward:
        output.mean().backward()
    _synchronize(policy)
    return time.perf_counter() - start


def _synchronize(policy: Policy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
