"""The inputs of a loss function, and its interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from b2ray.config import Objective


@dataclass(frozen=True)
class Densities:
    """The densities of N rows, each a (trajectory, step) pair.

    Log-densities are averaged over the elements of a latent; all tensors are float32, shape (N,).

    Attributes:
        log_prob: log-density under the weights that are trained, with gradients.
        old: log-density under the weights that sampled the trajectory.
        advantage: advantage of the trajectory.
        reference: log-density under the base model; None unless it was computed.
    """

    log_prob: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    reference: torch.Tensor | None = None


@dataclass(frozen=True)
class LossFunction:
    """The loss of an objective.

    The losses of all objectives have the same scale: as long as the policy is the one that sampled,
    the gradient of a row's loss by its log-density is about minus the advantage. So
    `objective.kl_weight` and `learner.max_grad_norm` mean the same for all objectives.

    Attributes:
        loss: the function (densities, settings, number of elements of a latent) -> (loss of each
            row, whether each row's gradient was clipped away), both of shape (N,).
        pairs: whether rows 2j and 2j + 1 have to be the same step of the best and of the worst
            leaf of a group.
        reference: whether the loss needs the densities under the base model.
    """

    loss: Callable[[Densities, Objective, int], tuple[torch.Tensor, torch.Tensor]]
    pairs: bool = False
    reference: bool = False
