"""Backward progressive training: stage to interval."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2ray.algorithm.curriculum import adapted, interval


def test_the_released_schedule():
    lengths = [interval(i, 100, 14, 20) for i in range(100)]
    assert [n for n, _ in groupby(lengths)] == [14, 15, 16, 17, 18, 19, 20]
    assert [len(list(stages)) for _, stages in groupby(lengths)] == [15, 14, 14, 15, 14, 14, 14]


def test_the_released_formula():
    assert all(interval(i, 100, 14, 20) == 14 + 7 * i // 100 for i in range(100))


def test_an_interval_that_does_not_grow_stays():
    assert {interval(i, 7, 14, 14) for i in range(7)} == {14}


def test_more_growth_stays_short_for_longer():
    linear = [interval(i, 50, 4, 20) for i in range(50)]
    late = [interval(i, 50, 4, 20, 3.0) for i in range(50)]
    assert all(a <= b for a, b in zip(late, linear, strict=True))
    assert late.count(4) > 2 * linear.count(4)
    assert late[-1] > 16


def test_half_growth_is_early():
    assert interval(25, 100, 0, 9, 0.5) == 5  # 10 · sqrt(1 / 4)


@given(
    stages=st.integers(1, 300),
    start=st.integers(1, 50),
    more=st.integers(0, 50),
    growth=st.floats(0.05, 20),
)
def test_it_starts_at_the_start_grows_and_stays_within(stages, start, more, growth):
    lengths = [interval(i, stages, start, start + more, growth) for i in range(stages)]
    assert lengths[0] == start
    assert lengths == sorted(lengths)
    assert lengths[-1] <= start + more


@given(stages=st.integers(1, 300), start=st.integers(1, 50), more=st.integers(0, 50))
def test_linear_growth_reaches_the_end_if_there_are_stages_enough(stages, start, more):
    reached = interval(stages - 1, stages, start, start + more)
    assert reached == start + more if stages > more else reached < start + more or more == 0


@pytest.mark.parametrize("stage", [-1, 10])
def test_a_stage_outside_the_run_is_refused(stage):
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        interval(stage, 10, 1, 5)


# --- growth by what the branches still differ by --------------------------------------------------


def test_the_interval_grows_once_the_branches_share_has_stayed_low():
    measured: list[tuple[int, float]] = []
    lengths = []
    shares = [0.5, 0.1, 0.4, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1]
    for share in shares:
        n = adapted(measured, 4, 20, min_share=0.25, patience=2)
        lengths.append(n)
        measured.append((n, share))
    # Two stages at one length with a mean below 0.25; the first stage after growth counts anew.
    assert lengths == [4, 4, 4, 4, 4, 5, 5, 5, 5, 6]


def test_it_stays_at_the_end():
    assert adapted([(20, 0.0)] * 9, 4, 20, min_share=0.5, patience=3) == 20


def test_it_starts_at_the_start():
    assert adapted([], 4, 20, min_share=0.5, patience=3) == 4
