"""Stored densities against the learner's own before the first update (method.md §7, defect 7)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from b2ray.diffusion.lora_file import digest
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.objectives.update import Updater
from tests.models import selection
from tests.unit.objectives.conftest import ADVANTAGES_7, PROMPTS_7


def weights(updater: Updater) -> str:
    return digest(updater.policy.lora_state())


def shifted(sampled: list[Trajectory], by: float) -> list[Selected]:
    """A selection whose stored densities are of other weights."""
    others = [replace(t, log_probs=t.log_probs + np.float32(by)) for t in sampled]
    return selection(others, PROMPTS_7, ADVANTAGES_7)


def test_densities_of_other_weights_are_refused_before_anything_changes(
    updater, sampled, first_weights
):
    learner = updater(learner__max_ratio_drift=0.1)
    with pytest.raises(ValueError, match="recompute_log_probs"):
        learner.update(0, shifted(sampled, 0.01))
    assert weights(learner) == digest(first_weights)


def test_densities_that_are_not_numbers_are_refused(updater, sampled):
    with pytest.raises(ValueError, match="ratio"):
        updater().update(0, shifted(sampled, float("nan")))


def test_densities_of_older_weights_are_measured_and_not_refused(updater, sampled, first_weights):
    learner, fetched = updater(learner__max_ratio_drift=0.1, learner__batch=4), []
    stale = [
        replace(s, fetch=lambda s=s: fetched.append(s) or s.fetch()) for s in shifted(sampled, 0.01)
    ]
    asked = []
    figures = learner.update(0, stale, fresh=lambda: asked.append(len(fetched)) or False)
    assert figures["policy/ratio_drift"] == pytest.approx(1 - np.exp(-0.01), rel=1e-2)
    assert weights(learner) != digest(first_weights)
    assert asked == [4]  # once, when the first batch is there


def test_the_samplers_own_densities_are_accepted(updater, selected):
    figures = updater(learner__max_ratio_drift=0.1).update(0, selected)
    assert figures["policy/ratio_drift"] < 1e-5


def test_recomputed_densities_make_the_stored_ones_irrelevant(updater, sampled, selected):
    ends = []
    for chosen in (selected, shifted(sampled, 0.01)):
        learner = updater(learner__recompute_log_probs="true", learner__max_ratio_drift=0.1)
        figures = learner.update(0, chosen)
        assert figures["policy/ratio_drift"] < 1e-6
        ends.append(weights(learner))
    assert ends[0] == ends[1]


def test_recomputed_densities_are_those_before_the_first_update(updater, selected):
    # In float32 at one shape they equal the sampler's, and so must the result.
    settings = {"learner__inner_epochs": 2, "learner__batch": 2, "objective__clip_nats": 0.05}
    ends = []
    for recompute in ("false", "true"):
        learner = updater(**settings, learner__recompute_log_probs=recompute)
        learner.update(0, selected)
        ends.append(np.concatenate([v.ravel() for v in learner.policy.lora_state().values()]))
    moved = np.abs(
        ends[0] - np.concatenate([v.ravel() for v in updater().policy.lora_state().values()])
    )
    assert np.abs(ends[0] - ends[1]).mean() < 0.02 * moved.mean()
