"""What an evaluation says of a policy, and what two of the same prompts and seeds say of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2ray.confidence import Estimate, Unit, estimate
from b2ray.evaluation import Evaluated, diversities

DIVERSITY = ("pairwise", "vendi")


@dataclass(frozen=True)
class Difference:
    """By how much the second of two policies is above the first.

    Attributes:
        mean: of the differences, paired by prompt and seed; its p is the paired test's.
        higher: share of the pictures (of the prompts, for diversity) on which the second has more.
        lower: share on which it has less.
    """

    mean: Estimate
    higher: float
    lower: float


def figures(found: Evaluated, unit: Unit) -> dict[str, Estimate]:
    """Every score and both diversities of a policy, by name.

    Args:
        unit: of scores. A diversity belongs to a prompt's pictures together, so that its unit is
            always the prompt.
    """
    return {name: estimate(*sample) for name, sample in _samples(found, unit).items()}


def differences(first: Evaluated, second: Evaluated, unit: Unit) -> dict[str, Difference]:
    """What changes from the first policy to the second, on the same prompts and seeds.

    Raises:
        ValueError: they are of other pictures.
    """
    if first.prompts != second.prompts:
        raise ValueError("the two evaluations are of other prompts")
    before, after = _samples(first, unit), _samples(second, unit)
    found = {}
    for name, (values, prompts, each) in after.items():
        if name in before:
            apart = values - before[name][0]
            mean = estimate(apart, prompts, each)
            found[name] = Difference(mean, float((apart > 0).mean()), float((apart < 0).mean()))
    return found


def _samples(found: Evaluated, unit: Unit) -> dict[str, tuple[np.ndarray, Sequence[str], Unit]]:
    """(values, their prompts, unit) of every figure."""
    samples: dict[str, tuple[np.ndarray, Sequence[str], Unit]] = {
        name: (values, found.prompts, unit) for name, values in found.scores.items()
    }
    each = {} if found.vectors is None else diversities(found.vectors, found.prompts)
    if each:
        for name, values in zip(DIVERSITY, zip(*each.values(), strict=True), strict=True):
            samples[name] = np.array(values), list(each), "prompt"
    return samples
