"""How sure a mean is: Student's intervals and paired tests, over pictures or over prompts.

Two questions have two answers. How good is a policy *on these prompts*? Then only the seeds vary,
and pictures of each prompt are the sample. How good is it *on prompts like these*? Then the prompts
are the sample, and pictures of one prompt are no independent witnesses: the prompt is the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Unit = Literal["picture", "prompt"]
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it can be trusted.

    Attributes:
        low: lower end of the 95 % interval; None where nothing varies, so that nothing is known of
            how much it would on other seeds.
        high: its upper end.
        p: two-sided, that a true mean of 0 would come out so far from 0; None like `low`.
        unit: what was counted as independent.
        units: how many of them there were.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    unit: Unit
    units: int

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.high is None else self.high - self.mean


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of independent values, such as one of each seed, by Student's
    t; None of fewer than two."""
    if len(values) < 2:
        return None
    x = np.asarray(values, np.float64)
    half = _half(len(x) - 1, float(x.std(ddof=1)) / len(x) ** 0.5)
    return float(x.mean()) - half, float(x.mean()) + half


def _half(freedom: float, error: float) -> float:
    """Half of the width of Student's interval."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2)) * error


def estimate(values: np.ndarray, prompts: Sequence[str], unit: Unit) -> Estimate:
    """The mean of `values` with Student's interval.

    Args:
        values: one for each picture, shape (N,); differences of the same seeds for a paired test.
        prompts: the prompt of each.
        unit: `picture`: the variance within each prompt counts (stratified sampling;
            Satterthwaite's degrees of freedom), or all of it where a prompt has one picture only.
            `prompt`: the variance of the prompts' sums around the mean counts (a mean over
            clusters; one degree of freedom less than there are prompts).
    """
    values = np.asarray(values, np.float64)
    # As summaries have it, to the last bit.
    mean = float(values.mean())
    _, which = np.unique(np.asarray(prompts), return_inverse=True)
    variance, freedom = (_of_prompts if unit == "prompt" else _of_pictures)(values, which)
    units = int(which.max()) + 1 if unit == "prompt" else len(values)
    # Of values that are all the same, rounding may leave a spread.
    if freedom <= 0 or variance <= (1e-12 * max(1.0, abs(mean))) ** 2:
        return Estimate(mean, None, None, None, unit, units)
    from scipy.special import stdtr

    error = float(np.sqrt(variance))
    half = _half(freedom, error)
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Estimate(mean, mean - half, mean + half, p, unit, units)


def _of_prompts(values: np.ndarray, which: np.ndarray) -> tuple[float, float]:
    """(variance of the mean, degrees of freedom) with prompts as clusters.

    The ratio estimator of cluster sampling (Cochran, Sampling Techniques, chapter 9A, without the
    correction for a finite population); with clusters of one size, the variance of their means.
    """
    count = int(which.max()) + 1
    if count < 2:
        return 0.0, 0.0
    sums = np.bincount(which, values - values.mean())
    return float(count / (count - 1) * (sums**2).sum() / len(values) ** 2), count - 1


def _of_pictures(values: np.ndarray, which: np.ndarray) -> tuple[float, float]:
    """(variance of the mean, degrees of freedom) with pictures as a sample of each prompt's.

    Stratified sampling (Cochran, Sampling Techniques, chapter 5).
    """
    if np.bincount(which).min() < 2:
        which = np.zeros_like(which)
    counts = np.bincount(which)
    if len(values) < 2:
        return 0.0, 0.0
    apart = values - (np.bincount(which, values) / counts)[which]
    parts = np.bincount(which, apart**2) / (counts - 1) * counts / len(values) ** 2
    variance = float(parts.sum())
    # What rounding leaves of equal values may have no square.
    squares = float((parts**2 / (counts - 1)).sum())
    return variance, variance**2 / squares if squares > 0 else 0.0
