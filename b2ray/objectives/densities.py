"""What an objective sees, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from b2ray.config import Objective as Settings


@dataclass(frozen=True)
class Densities:
    """(Trajectory, step) rows: log-densities averaged over the latent's elements, float32, (N,).

    Attributes:
        log_prob: under the weights being trained, with gradients.
        old: under the weights that sampled.
        advantage: of each row's trajectory.
        reference: under the base model; None unless the objective asks for it.
    """

    log_prob: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    reference: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """An objective: (rows, settings, elements of a latent) -> (loss per row, clipped per row).

    Losses of all objectives have one scale: where the policy is still the one that sampled, the
    gradient of a row by its log-density is about the advantage. So `objective.kl_weight` and
    `learner.max_grad_norm` mean the same with each.

    Attributes:
        pairs: rows 2j and 2j + 1 are one step of the best and of the worst leaf of a group.
        reference: whether it needs the base model's densities.
    """

    loss: Callable[[Densities, Settings, int], tuple[torch.Tensor, torch.Tensor]]
    pairs: bool = False
    reference: bool = False
