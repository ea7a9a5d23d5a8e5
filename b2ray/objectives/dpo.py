"""Direct preference optimization on single denoising steps: D3PO (arXiv 2311.13231, eq. 13)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from b2ray.config import Objective
from b2ray.objectives.densities import Densities, LossFunction


def dpo(
    densities: Densities, settings: Objective, elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log sigmoid(beta · margin) / (beta · elements) for pairs of a best and a worst leaf's step.

    A step's gain is its log-density minus that under the base model, in nats of a whole step. The
    margin is the best leaf's gain minus the worst leaf's. The division makes the gradient at a
    margin of 0 equal to that of the advantages 1 and -1.

    Args:
        densities: pairs of rows, with the densities under the base model.
        settings: the objective's settings, of which `beta` is used.
        elements: number of elements of a latent.

    Returns:
        The loss of each pair in both of its rows. No row is ever clipped.
    """
    assert densities.reference is not None
    gain = (densities.log_prob - densities.reference) * elements
    best, worst = gain.reshape(-1, 2).unbind(1)
    loss = -F.logsigmoid(settings.beta * (best - worst)) / (settings.beta * elements)
    row_losses = loss.repeat_interleave(2)  # so that the mean over rows is the mean over pairs
    return row_losses, torch.zeros_like(row_losses, dtype=torch.bool)


DPO = LossFunction(dpo, pairs=True, reference=True)
