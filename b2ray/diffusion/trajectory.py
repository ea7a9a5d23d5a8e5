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
class Prefix:
    """The end of a prefix that serves in several stages: where its later forks will be.

    Attributes:
        latents: x at t_first .. t_fork, shape (fork - first + 1, C, H, W), as they travel.
        first: index of the earliest step at which it can be forked.
    """

    latents: np.ndarray
    first: int

    def at(self, fork: int) -> np.ndarray:
        """x at a fork step, shape (C, H, W).

        Raises:
            ValueError: the prefix does not reach there.
        """
        last = self.first + len(self.latents) - 1
        if not self.first <= fork <= last:
            raise ValueError(f"a fork at step {fork}, but the prefix has {self.first}..{last}")
        return self.latents[fork - self.first]


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
