"""PPO-clip (arXiv 1707.06347, equation 7) on single denoising steps: DDPO-IS (arXiv 2305.13301)."""

from __future__ import annotations

import torch

from b2ray.config import Objective as Settings
from b2ray.objectives.densities import Densities, Objective


def ppo_clip(
    rows: Densities, settings: Settings, elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clip range is `clip_nats` of a whole step's density, so `clip_nats / elements` of a mean.

    Returns:
        The loss of each row, to be averaged, and whether clipping took its gradient away.
    """
    clip = settings.clip_nats / elements
    ratio = (rows.log_prob - rows.old).exp()
    free = rows.advantage * ratio
    bounded = rows.advantage * ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(free, bounded), bounded < free


PPO = Objective(ppo_clip)
