"""How certain a mean is: Student's intervals and paired tests, over pictures or over prompts.

Two questions have different answers. How good is a policy *on these prompts*? Then only the seeds
vary, and the pictures of each prompt are the sample. How good is it *on prompts like these*? Then
the prompts are the sample, and pictures of the same prompt are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Unit = Literal["picture", "prompt"]
LEVEL = 0.95  # of all intervals


@dataclass(frozen=True)
class Estimate:
    """A mean and how certain it is.

    Attributes:
        mean: the mean of the values.
        low: lower end of the 95 % confidence interval; None if the values do not vary, as it is
            unknown then how much they would on other seeds.
        high: upper end of the interval; None like `low`.
        p: two-sided p-value of the hypothesis that the true mean is 0; None like `low`.
        unit: what was taken as independent.
        units: how many independent units there are.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    unit: Unit
    units: int

    @property
    def half(self) -> float | None:
        """Half of the interval's width; None if there is no interval."""
        return None if self.high is None else self.high - self.mean


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval (low, high) of the mean of independent values, such as one per seed.

    None if there are fewer than two values.
    """
    if len(values) < 2:
        return None
    x = np.asarray(values, np.float64)
    half = _half(len(x) - 1, float(x.std(ddof=1)) / len(x) ** 0.5)
    return float(x.mean()) - half, float(x.mean()) + half


def _half(freedom: float, error: float) -> float:
    """Half of the width of Student's interval.

    Args:
        freedom: degrees of freedom.
        error: standard error of the mean.
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2)) * error


def estimate(values: np.ndarray, prompts: Sequence[str], unit: Unit) -> Estimate:
    """Estimate the mean of `values` with Student's interval.

    Args:
        values: one for each picture, shape (N,); for a paired test, differences between pictures
            of equal seeds.
        prompts: the prompt of each value.
        unit: `picture` takes the variance within each prompt, as in stratified sampling, with
            Satterthwaite's degrees of freedom; or the variance of all values if a prompt has only
            one. `prompt` takes prompts as clusters: the variance of their sums around the mean,
            with one degree of freedom less than there are prompts.
    """
    values = np.asarray(values, np.float64)
    # Computed as in the run's summary, so that both agree to the last bit.
    mean = float(values.mean())
    _, indices = np.unique(np.asarray(prompts), return_inverse=True)
    variance, freedom = (_of_prompts if unit == "prompt" else _of_pictures)(values, indices)
    units = int(indices.max()) + 1 if unit == "prompt" else len(values)
    # Rounding may leave a small variance where all values are equal.
    if freedom <= 0 or variance <= (1e-12 * max(1.0, abs(mean))) ** 2:
        return Estimate(mean, None, None, None, unit, units)
    from scipy.special import stdtr

    error = float(np.sqrt(variance))
    half = _half(freedom, error)
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Estimate(mean, mean - half, mean + half, p, unit, units)


def _of_prompts(values: np.ndarray, indices: np.ndarray) -> tuple[float, float]:
    """The (variance of the mean, degrees of freedom) with prompts as clusters.

    This is the ratio estimator of cluster sampling (Cochran, Sampling Techniques, chapter 9A,
    without the correction for a finite population). If all clusters have the same size, it is the
    variance of their means divided by their number.

    Args:
        values: shape (N,).
        indices: number of the prompt of each value, shape (N,).
    """
    count = int(indices.max()) + 1
    if count < 2:
        return 0.0, 0.0
    sums = np.bincount(indices, values - values.mean())
    return float(count / (count - 1) * (sums**2).sum() / len(values) ** 2), count - 1


def _of_pictures(values: np.ndarray, indices: np.ndarray) -> tuple[float, float]:
    """The (variance of the mean, degrees of freedom) with the prompts as strata.

    This is stratified sampling (Cochran, Sampling Techniques, chapter 5). If a prompt has only one
    picture, all prompts form one stratum. The arguments are those of `_of_prompts`.
    """
    if np.bincount(indices).min() < 2:
        indices = np.zeros_like(indices)
    counts = np.bincount(indices)
    if len(values) < 2:
        return 0.0, 0.0
    deviations = values - (np.bincount(indices, values) / counts)[indices]
    parts = np.bincount(indices, deviations**2) / (counts - 1) * counts / len(values) ** 2
    variance = float(parts.sum())
    # A variance that is only rounding may have a square of 0.
    squares = float((parts**2 / (counts - 1)).sum())
    return variance, variance**2 / squares if squares > 0 else 0.0
