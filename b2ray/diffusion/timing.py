"""How long UNet calls of different sizes take on this device."""

from __future__ import annotations

import time

import torch

from b2ray.diffusion import lora
from b2ray.diffusion.policy import Policy

REPEATS = 2  # the least of them counts, after a call that warms up


def time_call(policy: Policy, rows: int, backward: bool) -> float | None:
    """Seconds of one guided UNet call, as sampling or learning makes it.

    Args:
        policy: with at least one prompt prepared.
        rows: latents in the call.
        backward: with gradients and the way back, as in learning.

    Returns:
        None if the device has no memory for it.
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
    _wait(policy)
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        output = policy.predict(step, x, prompts)
    if backward:
        output.mean().backward()
    _wait(policy)
    return time.perf_counter() - began


def _wait(policy: Policy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
