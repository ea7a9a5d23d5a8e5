"""Figures of one policy, and differences of two on the same pictures."""

from __future__ import annotations

import numpy as np
import pytest

from b2ray.evaluation.compare import differences, figures
from b2ray.evaluation.evaluate import Evaluation

PROMPTS = ["x", "y", "z"] * 6


def evaluated(seed: int, prompts: list[str] = PROMPTS, **scores: np.ndarray) -> Evaluation:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(prompts), 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Evaluation(scores, prompts, vectors, [], {})


def test_means_are_those_of_a_runs_summary():
    found = evaluated(0, a=np.random.default_rng(5).normal(size=18))
    means = found.means(18)
    assert {name: e.mean for name, e in figures(found, "picture").items()} == means
    assert set(means) == {"a", "pairwise", "vendi"}


def test_diversity_belongs_to_prompts():
    found = figures(evaluated(0, a=np.arange(18.0)), "picture")
    assert [(e.unit, e.units) for e in found.values()] == [("picture", 18), *[("prompt", 3)] * 2]


def test_differences_are_paired():
    """The same rise of every picture is certain, however much pictures differ."""
    noise = np.random.default_rng(6).normal(0, 100, 18)
    rise = np.linspace(0.9, 1.1, 18)
    found = differences(evaluated(0, a=noise), evaluated(0, a=noise + rise), "picture")
    assert found["a"].mean.mean == pytest.approx(1.0)
    assert found["a"].mean.half < 0.05 and found["a"].mean.p < 1e-6
    assert (found["a"].higher, found["a"].lower) == (1.0, 0.0)
    assert found["vendi"].mean.mean == 0 and found["vendi"].mean.p is None


def test_ties_are_neither_higher_nor_lower():
    first, second = evaluated(0, a=np.zeros(18)), evaluated(1, a=np.repeat([1.0, 0.0, -1.0], 6))
    found = differences(first, second, "prompt")["a"]
    assert (found.higher, found.lower) == pytest.approx((1 / 3, 1 / 3))


def test_only_figures_of_both_are_compared():
    first, second = evaluated(0, a=np.zeros(18)), evaluated(0, a=np.zeros(18), b=np.zeros(18))
    assert list(differences(first, second, "prompt")) == ["a", "pairwise", "vendi"]


def test_other_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="other prompts"):
        differences(evaluated(0), evaluated(0, PROMPTS[::-1]), "prompt")


def test_without_pairs_of_pictures_there_is_no_diversity():
    alone = evaluated(0, list("abcdef"), a=np.arange(6.0))
    assert list(figures(alone, "prompt")) == ["a"]
