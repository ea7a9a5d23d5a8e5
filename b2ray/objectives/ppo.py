"""PPO-clip (arXiv 1707.06347, equation 7) on single denoising steps: DDPO-IS (arXiv 2305.13301)."""

from __future__ import annotations

import torch

from b2ray.config import Objective
from b2ray.objectives.densities import Densities, LossFunction


def ppo_clip(
    densities: Densities, settings: Objective, elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the minimum of ratio · advantage and clipped ratio · advantage.

    The clip range `clip_nats` refers to the log-density of a whole step, so it is divided by the
    number of elements for log-densities that are averaged over them.

    Args:
        densities: the rows.
        settings: the objective's settings, of which `clip_nats` is used.
        elements: number of elements of a latent.

    Returns:
        The loss of each row, to be averaged, and whether clipping removed its gradient.
    """
    clip = settings.clip_nats / elements
    ratio = (densities.log_prob - densities.old).exp()
    unclipped = densities.advantage * ratio
    clipped = densities.advantage * ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(unclipped, clipped), clipped < unclipped


PPO = LossFunction(ppo_clip)
