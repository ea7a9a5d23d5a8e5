"""Diversity figures, and that evaluations of any length look at the same pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2ray.config import Config, Prompts, Reward
from b2ray.config import Evaluation as EvaluationSettings
from b2ray.diffusion.noise import Domain
from b2ray.evaluation.evaluate import Evaluation, diversity, evaluation_units, overtaken

REWARDS = (Reward(name="a", kind="clip"), Reward(name="b", kind="clip", weight=-2.0))


def config(batch: int = 4) -> Config:
    return Config(
        prompts=Prompts(train="p.txt"),
        rewards=REWARDS,
        evaluation=EvaluationSettings(batch=batch),
        seed=9,
    )


@pytest.mark.parametrize("n", [2, 5])
def test_identical_pictures_are_one_picture(n):
    vectors = np.tile(np.array([[0.6, 0.8]], np.float32), (n, 1))
    pairwise, vendi = diversity(vectors, ["p"] * n)
    assert pairwise == pytest.approx(0, abs=1e-6)
    assert vendi == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("n", [2, 5])
def test_orthogonal_pictures_are_all_different(n):
    pairwise, vendi = diversity(np.eye(n, dtype=np.float32), ["p"] * n)
    assert pairwise == pytest.approx(1)
    assert vendi == pytest.approx(n)


def test_two_pairs_of_twins_are_two_pictures():
    vectors = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    pairwise, vendi = diversity(vectors, ["p"] * 4)
    assert pairwise == pytest.approx(4 / 6)
    assert vendi == pytest.approx(2)


def test_pairwise_is_the_mean_distance_of_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(6, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - vectors[i] @ vectors[j] for i in range(6) for j in range(i)]
    assert diversity(vectors, ["p"] * 6)[0] == pytest.approx(np.mean(pairs))


def test_only_pictures_of_the_same_prompt_are_compared():
    vectors = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    assert diversity(vectors, ["x", "y", "x", "y"]) == pytest.approx((0, 1), abs=1e-5)


def test_a_prompt_with_one_picture_does_not_count():
    vectors = np.eye(3, dtype=np.float32)
    assert diversity(vectors, ["x", "x", "y"]) == pytest.approx((1, 2))
    assert all(math.isnan(v) for v in diversity(vectors, ["x", "y", "z"]))


@given(
    short=st.integers(1, 20),
    more=st.integers(0, 20),
    prompts=st.integers(1, 7),
    batch=st.integers(1, 9),
)
def test_a_shorter_evaluation_is_the_beginning_of_a_longer_one(short, more, prompts, batch):
    names = [f"p{i}" for i in range(prompts)]

    def groups(count: int) -> list:
        units = evaluation_units(config(batch), names, which=1, version=3, count=count)
        assert [u.index for u in units] == list(range(len(units)))
        assert {(u.seed, u.domain, u.stage, u.version) for u in units} == {
            (9, Domain.EVALUATE, 1, 3)
        }
        assert {(u.branches, u.fork) for u in units} == {(1, 0)}
        texts = [group.prompt for unit in units for group in unit.groups]
        assert texts == [names[i % prompts] for i in range(count)]
        return [g for u in units for g in u.groups]

    longer = groups(short + more)
    assert groups(short) == longer[:short]
    assert [g.index for g in longer] == list(range(short + more))


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_named():
    rng = np.random.default_rng(0)
    picture = rng.normal(size=200)  # pictures differ more than training changes them
    before = {"reward": picture, "judge": picture, "other": picture}
    after = {
        "reward": picture + 0.1 + 0.1 * rng.normal(size=200),
        "judge": (picture - 0.1 + 0.1 * rng.normal(size=200))[:150],
        "other": picture + 0.5 * rng.normal(size=200),
    }
    assert overtaken(before, after, ["judge", "other"]) == ["judge"]
    assert overtaken(before, {**after, "reward": picture - 0.1}, ["judge"]) == []
    assert overtaken(before, before, ["judge"]) == []
    del before["reward"]  # with demonstrations no reward is trained on
    assert overtaken(before, after, ["judge"]) == []


def test_a_mean_can_be_of_the_first_pictures():
    scores = {"a": np.array([1.0, 2.0, 6.0])}
    found = Evaluation(scores, ["x", "x", "x"], np.eye(3, dtype=np.float32), [], {})
    assert found.means(3) == pytest.approx({"a": 3.0, "pairwise": 1.0, "vendi": 3.0})
    assert found.means(2) == pytest.approx({"a": 1.5, "pairwise": 1.0, "vendi": 2.0})


def test_diversity_is_left_out_where_there_is_none_to_measure():
    scores = {"a": np.array([1.0, 2.0])}
    assert Evaluation(scores, ["x", "y"], np.eye(2, dtype=np.float32), [], {}).means(2) == {
        "a": 1.5
    }
    assert Evaluation(scores, ["x", "x"], None, [], {}).means(2) == {"a": 1.5}
