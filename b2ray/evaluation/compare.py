"""The figures of an evaluation with their intervals, and paired differences of two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2ray.config import DIVERSITY
from b2ray.evaluation.evaluate import Evaluation, diversities
from b2ray.evaluation.statistics import Estimate, Unit, estimate


@dataclass(frozen=True)
class Difference:
    """How much higher a figure of the second of two policies is than that of the first.

    Attributes:
        mean: mean of the differences, paired by prompt and seed; its p is that of the paired test.
        higher: share of the pictures (for diversity, of the prompts) for which the second policy
            has the higher value.
        lower: share for which it has the lower value.
    """

    mean: Estimate
    higher: float
    lower: float


def figures(evaluation: Evaluation, unit: Unit) -> dict[str, Estimate]:
    """The mean of every score and of both diversities of a policy, by name.

    Args:
        evaluation: the policy's pictures and scores.
        unit: what is independent in the scores. In a diversity it is always the prompt, as each
            value is of all pictures of a prompt.
    """
    return {name: estimate(*sample) for name, sample in _samples(evaluation, unit).items()}


def differences(first: Evaluation, second: Evaluation, unit: Unit) -> dict[str, Difference]:
    """The change of every figure from the first policy to the second, by name.

    Args:
        first: the evaluation of the first policy.
        second: that of the second policy, on the same prompts and seeds.
        unit: what is independent in the scores; see `figures`.

    Raises:
        ValueError: the evaluations have different prompts.
    """
    if first.prompts != second.prompts:
        raise ValueError("the two evaluations are of other prompts")
    before, after = _samples(first, unit), _samples(second, unit)
    result = {}
    for name, (values, prompts, unit_of) in after.items():
        if name in before:
            change = values - before[name][0]
            mean = estimate(change, prompts, unit_of)
            higher, lower = float((change > 0).mean()), float((change < 0).mean())
            result[name] = Difference(mean, higher, lower)
    return result


def _samples(
    evaluation: Evaluation, unit: Unit
) -> dict[str, tuple[np.ndarray, Sequence[str], Unit]]:
    """The values of every figure, the prompt of each value, and what is independent in them."""
    samples: dict[str, tuple[np.ndarray, Sequence[str], Unit]] = {
        name: (values, evaluation.prompts, unit) for name, values in evaluation.scores.items()
    }
    vectors = evaluation.vectors
    by_prompt = {} if vectors is None else diversities(vectors, evaluation.prompts)
    if by_prompt:
        for name, values in zip(DIVERSITY, zip(*by_prompt.values(), strict=True), strict=True):
            samples[name] = np.array(values), list(by_prompt), "prompt"
    return samples
