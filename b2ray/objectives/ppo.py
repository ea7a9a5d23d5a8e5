"""PPO-clip (arXiv 1707.06347, equation 7) on single denoising steps (arXiv 2305.13301)."""

from __future__ import annotations

import torch


def ppo_clip(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of (trajectory, step) pairs.

    Args:
        log_prob: under the weights being trained, float32, shape (N,).
        old_log_prob: under the weights that sampled, same shape.
        advantage: of each pair's trajectory, same shape.
        clip: epsilon, the half-width of the range of the ratio in which a pair still has gradient.

    Returns:
        The loss of each pair, to be averaged, and whether clipping took its gradient away.
    """
    ratio = (log_prob - old_log_prob).exp()
    free = advantage * ratio
    bounded = advantage * ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(free, bounded), bounded < free
