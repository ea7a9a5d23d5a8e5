"""The score function estimator (REINFORCE) on single denoising steps: DDPO-SF (arXiv 2305.13301).

With `objective.kl_weight` above 0 it is DPOK's KL-regularised policy gradient (arXiv 2305.16381,
equation 9).
"""

from __future__ import annotations

import torch

from b2ray.config import Objective as Settings
from b2ray.objectives.densities import Densities, Objective


def policy_gradient(
    rows: Densities, settings: Settings, elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unbiased only at the weights that sampled, so for one optimizer step a stage: with
    `learner.passes=1` and `learner.batch=all`. Nothing is ever clipped."""
    return -rows.advantage * rows.log_prob, torch.zeros_like(rows.advantage, dtype=torch.bool)


POLICY_GRADIENT = Objective(policy_gradient)
