"""What share of a device's peak sampling and learning reach."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from b2ray.algorithm.cost import BACKWARD
from b2ray.config import Config
from b2ray.diffusion.policy import Policy
from b2ray.preflight import check_files
from benchmarks.speed.workloads import Work


def flops(config: Config, device: torch.device) -> int:
    """Floating-point operations of one guided evaluation of one latent."""
    policy = Policy(config, device)
    (prompt, *_) = check_files(config).trained()
    policy.prepare([prompt])  # a run encodes once, too
    step, x = torch.zeros(1, dtype=torch.int64), torch.zeros(1, *policy.latent_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.predict(step.to(device), x.to(device, policy.dtype), [prompt])
    return int(counter.get_total_flops())


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest square matrix product that was found."""
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        for _ in range(3):
            wait(device)
            began = time.perf_counter()
            a @ b
            wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(asked: Work, each: int, stage: dict[str, Any], peak: float) -> dict[str, float]:
    """What sampling and learning reach of the peak in a stage, all that they do counted as time.

    A way back counts as two ways there; activations that are computed again do not count.

    Args:
        asked: of a stage.
        each: operations of an evaluation.
        stage: its line of metrics.jsonl.
        peak: operations a second.
    """
    learnt = asked.scored_again + (1 + BACKWARD) * asked.trained
    return {
        "sampling": asked.sampled * each / stage["time/sample"] / peak,
        "learning": learnt * each / stage["time/update"] / peak,
    }
