"""Random numbers keyed by their purpose, independent of the order of calls.

Philox is a counter-based generator: its key and the upper words of its counter identify the draw,
and the lowest word counts within the draw. The same identity gives the same bytes in any process
on any machine, so work that is repeated elsewhere gives the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

INITIAL = 0  # the counter's step word for x_T; the noise of step i has the word i + 1
PREFIX = 0  # the counter's branch word for a group's prefix; branch k has the word k + 1


class Domain(IntEnum):
    """The purposes of random numbers; no two domains share a draw."""

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
    """A generator for the draw that the arguments identify together.

    Args:
        seed: the run's seed.
        domain: the purpose of the draw.
        stage: index of the stage.
        step: the counter's word for a denoising step, or for another index within the stage.
        branch: the counter's word for a branch.
        group: index of the group.
    """
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
        seed, domain, stage: as in `generator`.
        leaves: (group, branch word) of each row of the batch.
        step: the step word, the same for all rows.
        shape: shape of one row.

    Returns:
        float32, shape (len(leaves), *shape).
    """
    rows = [
        generator(seed, domain, stage, step, branch, group).standard_normal(shape, np.float32)
        for group, branch in leaves
    ]
    return np.stack(rows)
