"""Which of a trajectory's denoising steps an update is computed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Drawn:
    """Steps of one trajectory, in their order.

    Attributes:
        steps: their indices among the T steps.
        scale: what each stands for: 1 over its chance of being drawn.
    """

    steps: Sequence[int]
    scale: Sequence[float]

    @classmethod
    def all_of(cls, steps: Sequence[int]) -> Drawn:
        return cls(steps, [1.0] * len(steps))


def trained_steps(interval: int, trained: Sequence[bool]) -> list[int]:
    """Indices of those of the last `interval` steps that are trained at all."""
    return [j for j, yes in enumerate(trained) if yes and j >= len(trained) - interval]


def chances(size: Sequence[float], count: int) -> np.ndarray:
    """Chance of each step to be among `count` drawn ones, in proportion to its size where that is
    at most 1, shape (len(size),); they add up to `count`."""
    left, certain = np.asarray(size, np.float64), np.zeros(len(size), bool)
    while True:
        rest = left * ~certain
        found = np.where(certain, 1.0, (count - certain.sum()) * rest / max(rest.sum(), 1e-300))
        more = found > 1
        if not more.any():
            return found
        certain |= more


def draw(
    steps: Sequence[int], size: Sequence[float], count: int, random: np.random.Generator
) -> Drawn:
    """Exactly `count` of the steps: a sum over all of them is estimated without bias by the sum
    over the drawn ones, each times its scale (systematic sampling, Madow 1949)."""
    if count >= len(steps):
        return Drawn.all_of(steps)
    chance = chances(size, count)
    # Marks at a distance of 1 from a random start; a step is drawn if a mark falls on its stretch.
    marks = random.uniform() + np.arange(count)
    ends = np.cumsum(chance)
    ends *= count / ends[-1]
    taken = np.searchsorted(ends, marks, side="right").tolist()
    return Drawn([steps[j] for j in taken], [float(1 / chance[j]) for j in taken])
