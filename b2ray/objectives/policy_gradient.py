"""The score function estimator (REINFORCE) on single denoising steps: DDPO-SF (arXiv 2305.13301).

With `objective.kl_weight` above 0 this is DPOK's KL-regularised policy gradient (arXiv 2305.16381,
equation 9).
"""

from __future__ import annotations

import torch

from b2ray.config import Objective
from b2ray.objectives.densities import Densities, LossFunction


def policy_gradient(
    densities: Densities, settings: Objective, elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the advantage times the log-density.

    The gradient is unbiased only at the weights that sampled the trajectories, so for a single
    optimizer step per stage (`learner.inner_epochs=1` and `learner.batch=all`).

    Args:
        densities: the rows.
        settings: not used.
        elements: not used.

    Returns:
        The loss of each row. No row is ever clipped.
    """
    loss = -densities.advantage * densities.log_prob
    return loss, torch.zeros_like(densities.advantage, dtype=torch.bool)


POLICY_GRADIENT = LossFunction(policy_gradient)
