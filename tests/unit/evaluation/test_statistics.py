"""Intervals that hold as often as they say, and the tests that SciPy has for the simple cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from b2ray.evaluation.statistics import estimate


@pytest.mark.parametrize("unit", ["picture", "prompt"])
def test_one_picture_a_prompt_is_students_test(unit):
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    found = estimate(values, [f"p{i}" for i in range(40)], unit)
    known = stats.ttest_1samp(values, 0)
    assert found.mean == values.mean()
    assert (found.low, found.high) == pytest.approx(known.confidence_interval())
    assert found.p == pytest.approx(known.pvalue)
    assert (found.unit, found.units) == (unit, 40)


def test_prompts_with_as_many_pictures_each_are_students_test_of_their_means():
    values = np.random.default_rng(1).normal(0.3, 1, 40)
    found = estimate(values, [f"p{i % 8}" for i in range(40)], "prompt")
    known = stats.ttest_1samp(values.reshape(5, 8).mean(axis=0), 0)
    assert (found.low, found.high) == pytest.approx(known.confidence_interval())
    assert found.p == pytest.approx(known.pvalue)
    assert found.units == 8


def test_pictures_of_two_prompts_are_welchs_test():
    """The mean of two strata of one size is, but for a sign, half of a difference of two means."""
    a, b = np.random.default_rng(2).normal([[0.2], [-0.4]], [[1.0], [3.0]], (2, 12))
    found = estimate(np.concatenate([a, b]), ["a"] * 12 + ["b"] * 12, "picture")
    known = stats.ttest_ind(a, -b, equal_var=False)
    assert found.p == pytest.approx(known.pvalue)
    assert 2 * np.array([found.low, found.high]) == pytest.approx(known.confidence_interval())


@pytest.mark.parametrize("unit", ["picture", "prompt"])
def test_19_of_20_intervals_hold_the_truth(unit):
    """Also where prompts have different spreads and not all as many pictures."""
    rng, hits, tries = np.random.default_rng(3), 0, 1000
    prompts = [f"p{i % 6}" for i in range(33)]
    which = np.arange(33) % 6
    for _ in range(tries):
        # Prompts are a sample of prompts, or they are what they are.
        centres = rng.normal(0, 1, 6) if unit == "prompt" else np.arange(6.0)
        truth = 0.0 if unit == "prompt" else centres[which].mean()
        found = estimate(centres[which] + rng.normal(0, 1 + which), prompts, unit)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / tries <= 0.98


def test_what_differs_between_prompts_is_no_doubt_about_these_prompts():
    rng = np.random.default_rng(4)
    prompts = [f"p{i % 4}" for i in range(80)]
    values = np.arange(80) % 4 + rng.normal(0, 0.1, 80)
    of_these = estimate(values, prompts, "picture")
    of_others = estimate(values, prompts, "prompt")
    assert of_these.mean == of_others.mean
    assert of_these.half < 0.05 < 1 < of_others.half


@given(
    value=st.floats(-1e6, 1e6),
    count=st.integers(1, 12),
    prompts=st.integers(1, 5),
    unit=st.sampled_from(["picture", "prompt"]),
)
@example(value=1.0792231034406046e-116, count=5, prompts=1, unit="picture")  # 1e-116² is 0
def test_where_nothing_varies_nothing_is_claimed(value, count, prompts, unit):
    found = estimate(np.full(count, value), [f"p{i % prompts}" for i in range(count)], unit)
    assert found.mean == pytest.approx(value)
    assert found.low is found.high is found.p is found.half is None


def test_one_prompt_says_nothing_of_others():
    found = estimate(np.array([0.0, 1.0, 2.0]), ["p"] * 3, "prompt")
    assert (found.low, found.units) == (None, 1)
