"""The figures of benchmarks/pruning.py."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from pruning import gap_of, table


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_the_expected_gap_is_that_of_all_subsets(count: int) -> None:
    rewards = np.random.default_rng(0).normal(size=(4, 6))
    gaps = [np.ptp(rewards[:, list(c)], axis=1).mean() for c in combinations(range(6), count)]
    assert gap_of(rewards, count) == pytest.approx(np.mean(gaps))


def test_between_whole_numbers_the_gap_is_linear() -> None:
    rewards = np.random.default_rng(1).normal(size=(3, 5))
    middle = (gap_of(rewards, 3) + 3 * gap_of(rewards, 4)) / 4
    assert gap_of(rewards, 3.75) == pytest.approx(middle)


def test_predictions_that_tell_all_keep_the_whole_gap() -> None:
    """The second evaluation predicts the finished order, the third its reverse."""
    final = np.array([[0.0, 1.0, 2.0, 5.0]])
    rows = table(np.stack([final / 10, -final, final])).splitlines()[2:]
    told, reversed_, whole = ([c.strip() for c in row.split("|")[1:-1]] for row in rows)
    assert told[1:3] == ["1.00", "5.000"] and reversed_[1:3] == ["-1.00", "-5.000"]
    # Of 4 branches all make two evaluations, and 2 of them a third: 10 of 12.
    assert told[0] == "2" and told[3] == "83%" and whole[2] == "5.000"
