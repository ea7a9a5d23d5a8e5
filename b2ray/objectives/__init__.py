"""What an update maximises. One function per objective, by name in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from b2ray.objectives.ppo import ppo_clip

# (log_prob, old log_prob, advantage, clip range) -> (loss per pair, clipped per pair)
Objective = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]
OBJECTIVES: dict[str, Objective] = {"ppo": ppo_clip}
