"""DPO on single denoising steps: D3PO (arXiv 2311.13231, equation 13)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from b2ray.config import Objective as Settings
from b2ray.objectives.densities import Densities, Objective


def dpo(rows: Densities, settings: Settings, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log sigmoid(beta · margin) for each step of a best and a worst leaf of one group.

    The margin is how much likelier than under the base model the best leaf's step is, minus the
    same of the worst leaf's, in nats of whole steps. Divided by beta · elements: at a margin of 0
    the gradient is that of advantages of 1 and -1.

    Returns:
        The loss of each pair in both of its rows. Nothing is ever clipped.
    """
    assert rows.reference is not None
    gain = (rows.log_prob - rows.reference) * elements
    best, worst = gain.reshape(-1, 2).unbind(1)
    loss = -F.logsigmoid(settings.beta * (best - worst)) / (settings.beta * elements)
    both = loss.repeat_interleave(2)  # the mean over rows is the mean over pairs
    return both, torch.zeros_like(both, dtype=torch.bool)


DPO = Objective(dpo, pairs=True, reference=True)
