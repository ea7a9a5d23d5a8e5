"""A run as a curve of its evaluations, and what is read from the curves of several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from b2ray.algorithm.cost import BACKWARD
from b2ray.evaluation.statistics import mean_interval

RESAMPLES = 2000


@dataclass(frozen=True)
class Curve:
    """A run by its evaluations on fixed seeds: arrays of one length."""

    queries: np.ndarray
    work: np.ndarray
    reward: np.ndarray
    judge: np.ndarray
    pairwise: np.ndarray


@dataclass(frozen=True)
class Point:
    """Where a mean over seeds stands: what it has cost, and its mean pairwise diversity."""

    queries: float
    work: float
    pairwise: float


@dataclass(frozen=True)
class Shares:
    """What a method needs to get where another one stands at best, in shares of what that one had
    spent by then.

    Attributes:
        level: the highest mean over seeds of the other one's evaluations.
        other: where that was.
        there: where this one reaches it; None if it never does.
        queries, work: 95 % intervals of the shares; an end is infinite where it is not reached.
    """

    level: float
    other: Point
    there: Point | None
    queries: tuple[float, float]
    work: tuple[float, float]


def curve(result: dict[str, Any]) -> Curve:
    """A finished run by its evaluations.

    Work is in guided UNet evaluations of one latent, a backward pass counted as two forward ones.
    """
    points = result["points"]
    return Curve(
        queries=np.array([p["reward_queries"] for p in points]),
        work=np.array([p["unet_evals"] + BACKWARD * p["unet_backwards"] for p in points]),
        reward=np.array([p["reward"] for p in points]),
        judge=np.array([p["judge"] for p in points]),
        pairwise=np.array([p["pairwise"] for p in points], float),  # nan: not measured
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over seeds (Student's t)."""
    mean, ends = float(np.mean(values)), mean_interval(values)
    return mean, ends[1] - mean if ends else float("nan")


def reaches(curves: Sequence[Curve], what: str, level: float) -> Point | None:
    """Where a mean over seeds reaches a level, by straight lines between evaluations; None if it
    never does.

    Args:
        what: "reward" or "judge".
    """
    found = [
        crossing(_mean(curves, other), _mean(curves, what), level)
        for other in ("queries", "work", "pairwise")
    ]
    return None if None in found else Point(*found)


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """x where y first reaches a level, by straight lines between points; None if it never does."""
    above = np.flatnonzero(np.asarray(y) >= level)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(x[0])
    share = (level - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i] + (share - 1) * (x[i] - x[i - 1]))


def shares(own: Sequence[Curve], other: Sequence[Curve], what: str) -> Shares:
    """What one method needs until its mean stands where another one's stands at best.

    At best, not at the end: a method that falls apart in the end would be too easy to reach. The
    intervals are those of a bootstrap over seeds, drawn for both methods together, since the
    same seeds begin with the same pictures.

    Args:
        own, other: of the same seeds, in the same order.
        what: "reward" or "judge".
    """
    drawn = np.random.default_rng(0).integers(0, len(own), (RESAMPLES, len(own)))
    found = []
    for rows in drawn:
        level, whole = peak([other[i] for i in rows], what)
        there = reaches([own[i] for i in rows], what, level)
        reached = (there.queries, there.work) if there else (np.inf, np.inf)
        found.append([a / b for a, b in zip(reached, (whole.queries, whole.work), strict=True)])
    low, high = np.percentile(found, (2.5, 97.5), axis=0, method="inverted_cdf")
    level, whole = peak(other, what)
    there = reaches(own, what, level)
    return Shares(level, whole, there, (low[0], high[0]), (low[1], high[1]))


def peak(curves: Sequence[Curve], what: str) -> tuple[float, Point]:
    """The highest mean over seeds after the first evaluation, and where it stands."""
    mean = _mean(curves, what)[1:]
    i = 1 + int(np.argmax(mean))
    queries, work, pairwise = (float(_mean(curves, x)[i]) for x in ("queries", "work", "pairwise"))
    return float(mean[i - 1]), Point(queries, work, pairwise)


def _mean(curves: Sequence[Curve], what: str) -> np.ndarray:
    return np.mean([getattr(c, what) for c in curves], axis=0)
