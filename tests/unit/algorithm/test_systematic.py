"""Systematic sampling draws as often as the chances say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from b2ray.algorithm.systematic import systematic


@given(
    chances=st.lists(st.floats(1e-3, 10), min_size=1, max_size=12),
    count=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_every_position_is_drawn_within_one_of_its_expected_number(chances, count, seed):
    line = np.array(chances)
    drawn = systematic(line, count, np.random.default_rng(seed))
    assert len(drawn) == count and (np.diff(drawn) >= 0).all()
    expected = count * line / line.sum()
    assert (np.abs(np.bincount(drawn, minlength=len(line)) - expected) < 1 + 1e-9).all()


def test_the_mean_number_is_the_expected_one():
    line, random = np.array([0.2, 0.5, 0.3]), np.random.default_rng(0)
    counts = sum(np.bincount(systematic(line, 1, random), minlength=3) for _ in range(4000))
    np.testing.assert_allclose(counts / 4000, line, atol=0.03)
