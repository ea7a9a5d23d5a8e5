"""Trajectories, and latents as they travel between actors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Trajectory:
    """A branch's interval as it was sampled.

    Attributes:
        latents: x at t_fork .. t_T, shape (n + 1, C, H, W); bfloat16 travels as uint16.
        log_probs: density of each of the n steps, float32, shape (n,).
        version: the policy version that sampled it.
    """

    latents: np.ndarray
    log_probs: np.ndarray
    version: int


@dataclass(frozen=True)
class Selected:
    """What the driver knows of a trajectory that is trained on; `fetch` brings its arrays.

    Attributes:
        interval: n, how many steps it has.
        age: stages since it was sampled; 0 is the stage's own.
    """

    prompt: str
    advantage: float
    interval: int
    fetch: Callable[[], Trajectory]
    age: int = 0


def to_wire(latents: torch.Tensor) -> np.ndarray:
    """Latents as numpy, which Ray shares without a copy; bfloat16 as a uint16 view."""
    import torch

    latents = latents.cpu().contiguous()
    return (latents.view(torch.uint16) if latents.dtype == torch.bfloat16 else latents).numpy()


def from_wire(array: np.ndarray) -> torch.Tensor:
    """What `to_wire` made, as a tensor of its own memory."""
    import torch

    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
