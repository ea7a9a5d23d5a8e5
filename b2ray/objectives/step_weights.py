"""Weights of the denoising steps in the loss, and the sizes of their gradients."""

from __future__ import annotations

import torch

from b2ray.config import Config
from b2ray.diffusion.policy import Policy


def step_weights(policy: Policy, config: Config) -> torch.Tensor | None:
    """Weight of each step in the loss, with mean 1 over the trainable steps, shape (T,).

    None means that the weights depend on the trajectory (see `b2ray.objectives.batch.batch_of`).

    Args:
        policy: the policy, of which the schedule is used.
        config: the run's configuration, of which `objective.step_weights` is used.
    """
    schedule, kind = policy.schedule, config.objective.step_weights
    if kind == "displacement":
        return None
    if kind == "none":
        return torch.ones_like(schedule.sigma)
    trainable = torch.tensor(schedule.trainable, device=schedule.sigma.device)
    weights = torch.where(trainable, 1 / schedule.sensitivity(), 0.0)
    if kind == "noise":
        weights = weights * schedule.reach()
    elif not isinstance(kind, str):
        weights = weights * torch.tensor(kind, device=weights.device)
    return weights / weights[trainable].mean().clamp(min=1e-12)


def step_sizes(policy: Policy, config: Config, weights: torch.Tensor | None) -> list[float]:
    """Expected size of each step's gradient, to which its sampling probability is proportional.

    As in importance sampling, steps with larger gradients are sampled more often. The size is the
    step's weight times the sensitivity of its density. The divergence from the base model has the
    same size in all steps.

    Args:
        policy: the policy, of which the schedule is used.
        config: the run's configuration, of which `objective.kl_weight` is used.
        weights: the result of `step_weights`.

    Returns:
        T sizes, which add up to 1 and are 0 for steps that are not trainable.
    """
    sizes = torch.ones_like(policy.schedule.sigma)
    if weights is not None:
        sizes = weights * policy.schedule.sensitivity()
    trainable = torch.tensor(policy.schedule.trainable, device=sizes.device)
    sizes = torch.where(trainable, sizes, 0.0)
    sizes = sizes / sizes.sum().clamp(min=1e-12)
    if config.objective.kl_weight:
        sizes = (sizes + trainable / trainable.sum()) / 2
    return [float(size) for size in sizes]
