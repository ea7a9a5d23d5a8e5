"""Several rewards as one: weights, declared scales, their own windows."""

from __future__ import annotations

import numpy as np
import pytest

from b2ray.algorithm.branching import RewardWindow
from b2ray.config import Reward
from b2ray.rewards.combine import combine, statistics

SCORES = {"a": np.array([[1.0, 2.0], [3.0, 6.0]]), "b": np.array([[20.0, 21.0], [22.0, 19.0]])}


def test_the_sum_is_weighted():
    rewards = [Reward(name="a", kind="clip"), Reward(name="b", kind="clip", weight=-2.0)]
    np.testing.assert_array_equal(combine(rewards, SCORES, {}), SCORES["a"] - 2 * SCORES["b"])


def test_a_declared_scale_divides():
    rewards = [Reward(name="a", kind="clip", scale=2.0), Reward(name="b", kind="clip", scale=10.0)]
    np.testing.assert_allclose(combine(rewards, SCORES, {}), SCORES["a"] / 2 + SCORES["b"] / 10)


def test_a_window_standardises_each_reward_by_itself():
    rewards = [Reward(name=n, kind="clip", scale="window") for n in "ab"]
    found = combine(rewards, SCORES, statistics(rewards, SCORES))
    z = [(SCORES[n] - SCORES[n].mean()) / SCORES[n].std(ddof=1) for n in "ab"]
    np.testing.assert_allclose(found, z[0] + z[1])


def test_the_windows_statistics_are_those_of_the_last_stages():
    window = RewardWindow(1)
    for stage in (100.0, 1.0, 2.0):  # the first falls out of a window of one earlier stage
        window = window.with_stage(["a"], np.array([[stage, stage + 1]]))
    mean, std = window.statistics(2)["a"]
    assert (mean, std) == pytest.approx((2.0, np.std([1, 2, 2, 3], ddof=1)))


def test_scores_without_any_spread_do_not_divide_by_zero():
    rewards = [Reward(name="a", kind="clip", scale="window")]
    scores = {"a": np.full(4, 0.5)}
    assert combine(rewards, scores, statistics(rewards, scores)).tolist() == [0.0] * 4


def test_a_reward_of_another_magnitude_does_not_drown_the_others():
    """Of two rewards of equal weight and unlike units, both order the pictures."""
    rng = np.random.default_rng(0)
    scores = {"a": rng.normal(size=500), "b": 1000 * rng.normal(size=500)}
    rewards = [Reward(name=n, kind="clip", scale="window") for n in "ab"]
    total = combine(rewards, scores, statistics(rewards, scores))
    for name in "ab":
        assert np.corrcoef(total, scores[name])[0, 1] == pytest.approx(0.7, abs=0.1)
