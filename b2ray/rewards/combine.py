"""Combination of several rewards into the number that is maximised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from b2ray.algorithm.branching import MIN_STD
from b2ray.config import Reward

Statistics = Mapping[str, tuple[float, float]]  # reward name -> (mean, std)


def combine(
    rewards: Sequence[Reward], scores: Mapping[str, np.ndarray], statistics: Statistics
) -> np.ndarray:
    """The sum of weight · score / scale, or of weight · (score - mean) / std with `scale=window`.

    Args:
        rewards: the specifications of the rewards to combine.
        scores: the scores by reward, arrays of the same shape.
        statistics: mean and standard deviation of each reward with `scale=window`; a reward without
            them is not normalised.

    Returns:
        float64, the shape of the scores.
    """
    return np.sum([r.weight * _normalised(r, scores[r.name], statistics) for r in rewards], axis=0)


def statistics(rewards: Sequence[Reward], scores: Mapping[str, np.ndarray]) -> Statistics:
    """Mean and standard deviation of the scores of each reward with `scale=window`.

    Args:
        rewards: the specifications of the rewards.
        scores: the scores by reward; a reward with a single score is left out.
    """
    return {
        r.name: (float(scores[r.name].mean()), float(scores[r.name].std(ddof=1)))
        for r in rewards
        if r.scale == "window" and scores[r.name].size > 1
    }


def _normalised(reward: Reward, scores: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Scores divided by the reward's scale, or standardised with `scale=window`."""
    scores = scores.astype(np.float64)
    if reward.scale != "window":
        return scores / reward.scale
    mean, std = statistics.get(reward.name, (0.0, 1.0))
    return (scores - mean) / max(std, MIN_STD)
