"""Random numbers keyed by what they are for, never by the order of calls.

Philox is counter-based: the key and the upper words of the counter name the draw, the lowest word
counts within it. The same name gives the same bytes on any machine, in any process, any number of
times, so a piece of work that is done again, elsewhere, gives the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

INITIAL = 0  # the step word of x_T; the noise of step i has the word i + 1
PREFIX = 0  # the branch word of a group's prefix; branch k has the word k + 1


class Domain(IntEnum):
    """What random numbers are for; one domain never shares a draw with another."""

    TRAIN = 0
    EVALUATE = 1
    PROMPTS = 2
    ORDER = 3
    SAMPLE = 4
    DEMONSTRATE = 5
    STEPS = 6


def generator(
    seed: int, domain: Domain, stage: int, step: int = 0, branch: int = 0, group: int = 0
) -> np.random.Generator:
    """A generator for the draw that the numbers name together."""
    key = np.array([seed, (stage << 8) | int(domain)], dtype=np.uint64)
    counter = np.array([0, step, branch, group], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(
    seed: int,
    domain: Domain,
    stage: int,
    leaves: Sequence[tuple[int, int]],
    step: int,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Standard normal noise for a batch.

    Args:
        seed, domain, stage: the key.
        leaves: (group, branch word) of each row of the batch.
        step: the step word.
        shape: shape of one row.

    Returns:
        float32, shape (len(leaves), *shape).
    """
    rows = [
        generator(seed, domain, stage, step, branch, group).standard_normal(shape, np.float32)
        for group, branch in leaves
    ]
    return np.stack(rows)
