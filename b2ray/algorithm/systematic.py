"""Systematic sampling: samples of a fixed size with unequal probabilities."""

from __future__ import annotations

import numpy as np


def systematic(chances: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw `count` positions with probabilities in proportion to `chances` (Madow 1949).

    The chances are laid on a line as intervals, one after the other. Marks at equal distances, all
    shifted by the same random number, are put on the line, and a position is drawn once for every
    mark in its interval. How often it is drawn differs by less than one from its expected value.

    Args:
        chances: relative expected frequency of each position, shape (N,).
        count: how many positions to draw.
        random: generator of the random number.

    Returns:
        int64, shape (count,), sorted.
    """
    marks = random.random() + np.arange(count)
    ends = chances.cumsum()
    ends *= count / ends[-1]
    # Rounding may put the last mark on the line's end.
    return np.searchsorted(ends, marks, side="right").clip(max=len(chances) - 1)
