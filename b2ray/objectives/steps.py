"""Selection of the denoising steps of a trajectory that an update is computed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2ray.algorithm.systematic import systematic


@dataclass(frozen=True)
class SampledSteps:
    """The steps of one trajectory that were sampled for an update.

    Attributes:
        steps: indices of the steps among the T steps, ascending.
        scale: for each step, 1 divided by its probability of being sampled.
    """

    steps: Sequence[int]
    scale: Sequence[float]

    @classmethod
    def all_of(cls, steps: Sequence[int]) -> SampledSteps:
        """All of these steps, each with the scale 1."""
        return cls(steps, [1.0] * len(steps))


def trained_steps(interval: int, trained: Sequence[bool]) -> list[int]:
    """Indices of the trained steps of an interval.

    Args:
        interval: n, the number of steps of the interval, which are the last ones.
        trained: for each of the T steps, whether it is trained.
    """
    return [j for j, on in enumerate(trained) if on and j >= len(trained) - interval]


def chances(size: Sequence[float], count: int) -> np.ndarray:
    """The probability with which each step is among the sampled ones.

    Probabilities are proportional to the sizes, except that those which would exceed 1 are 1.

    Args:
        size: size of each step, not negative, shape (N,).
        count: number of steps that are sampled, to which the probabilities add up.

    Returns:
        float64, shape (N,).
    """
    sizes, certain = np.asarray(size, np.float64), np.zeros(len(size), bool)
    while True:
        rest = sizes * ~certain
        chance = np.where(certain, 1.0, (count - certain.sum()) * rest / max(rest.sum(), 1e-300))
        above_one = chance > 1
        if not above_one.any():
            return chance
        certain |= above_one


def draw(
    steps: Sequence[int], size: Sequence[float], count: int, random: np.random.Generator
) -> SampledSteps:
    """Sample exactly `count` steps without replacement (`systematic`).

    The sum over the sampled steps, each multiplied by its scale, is an unbiased estimate of the sum
    over all steps.

    Args:
        steps: indices of the steps to choose from.
        size: size of each of them, to which its probability is proportional.
        count: number of steps to sample.
        random: the generator.
    """
    if count >= len(steps):
        return SampledSteps.all_of(steps)
    chance = chances(size, count)
    positions = systematic(chance, count, random).tolist()
    return SampledSteps([steps[j] for j in positions], [float(1 / chance[j]) for j in positions])
