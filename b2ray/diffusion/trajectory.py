"""Trajectories, and the form in which latents are sent between actors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Trajectory:
    """The interval of one branch as it was sampled: n denoising steps from the fork to the end.

    Attributes:
        latents: x at t_fork .. t_T, shape (n + 1, C, H, W), in the form of `to_wire`.
        log_probs: log-density of each of the n steps, float32, shape (n,).
        version: version of the policy that sampled the trajectory.
    """

    latents: np.ndarray
    log_probs: np.ndarray
    version: int


@dataclass(frozen=True)
class Selected:
    """A trajectory that was selected for training, without its arrays.

    Attributes:
        prompt: the prompt that it was sampled for.
        advantage: its advantage.
        interval: n, its number of steps.
        fetch: loads the trajectory with its arrays.
        age: number of stages since it was sampled; 0 means that this stage sampled it.
    """

    prompt: str
    advantage: float
    interval: int
    fetch: Callable[[], Trajectory]
    age: int = 0


def to_wire(latents: torch.Tensor) -> np.ndarray:
    """Convert latents to a numpy array, which Ray shares without a copy.

    bfloat16, which numpy lacks, becomes a uint16 array of the same bits.
    """
    import torch

    latents = latents.cpu().contiguous()
    return (latents.view(torch.uint16) if latents.dtype == torch.bfloat16 else latents).numpy()


def from_wire(array: np.ndarray) -> torch.Tensor:
    """Convert an array from `to_wire` back to a tensor, which has its own memory."""
    import torch

    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
