"""Trajectories of earlier stages in an update: the order, the densities, and whose drift counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from b2ray.diffusion.lora_file import digest
from b2ray.diffusion.noise import Domain, generator
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.objectives.update import Updater
from tests.models import selection
from tests.unit.objectives.conftest import ADVANTAGES_7, PROMPTS_7

CHECKED = {"learner__max_ratio_drift": 0.1}


def moved(updater: Updater, first_weights: dict[str, np.ndarray]) -> bool:
    return digest(updater.policy.lora_state()) != digest(first_weights)


def shifted(trajectory: Trajectory, by: float) -> Trajectory:
    """Densities as of other weights."""
    return replace(trajectory, log_probs=trajectory.log_probs + np.float32(by))


def mixed(sampled: Sequence[Trajectory], own: int, by: float = 0.01) -> list[Selected]:
    """`own` trajectories of the stage, then older ones that other weights sampled."""
    young, old = sampled[:own], [shifted(t, by) for t in sampled[own:]]
    found = selection([*young, *old], PROMPTS_7, ADVANTAGES_7)
    return [replace(s, age=int(j >= own)) for j, s in enumerate(found)]


def batches(updater: Updater, selected: list[Selected]) -> list[list[int]]:
    """Which trajectories each optimizer step of an update has, in the order of their fetching."""
    visits: list[list[int]] = [[]]
    step = updater.optimizer.step
    updater.optimizer.step = lambda: visits.append([]) or step()
    counted = [
        replace(s, fetch=lambda j=j, s=s: visits[-1].append(j) or s.fetch())
        for j, s in enumerate(selected)
    ]
    updater.update(0, counted)
    return visits[:-1]


# --- the order -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_every_batch_has_its_share_and_the_first_has_the_stages_own(
    updater, sampled, size, subtests
):
    learner = updater(learner__batch=size, learner__inner_epochs=1)
    for own in (1, 2, 3, 5, 6):
        with subtests.test(own=own):
            cut = batches(learner, mixed(sampled, own))
            assert sorted(j for batch in cut for j in batch) == [*range(7)]
            assert len(cut) == -(-7 // size)
            lengths = [len(batch) for batch in cut]
            assert max(lengths) - min(lengths) <= 1 and max(lengths) <= size
            shares = [sum(j < own for j in batch) for batch in cut]
            assert shares[0] > 0 and max(shares) - min(shares) <= 1


def test_without_replay_the_order_is_that_of_its_own(updater, selected):
    learner = updater(learner__batch=3, learner__inner_epochs=2)
    expected = [
        sorted(batch.tolist())
        for epoch in range(2)
        for batch in np.array_split(generator(0, Domain.ORDER, 0, epoch).permutation(7), 3)
    ]
    assert batches(learner, selected) == expected


def test_pairs_of_earlier_stages_stay_pairs(updater, sampled):
    over = {"selection__require_pair": "true", "objective__kind": "dpo"}
    learner = updater(**over, learner__batch=2, learner__inner_epochs=1)
    chosen = mixed(sampled, 4)[:6]
    pairs = [replace(s, prompt=PROMPTS_7[j // 2], age=int(j >= 4)) for j, s in enumerate(chosen)]
    found = [sorted(batch) for batch in batches(learner, pairs)]
    assert sorted(found) == [[0, 1], [2, 3], [4, 5]] and found[0] != [4, 5]


# --- what it learns ----------------------------------------------------------------------------


def test_an_older_trajectory_counts_as_one_of_the_stage_with_its_own_ratio(updater, sampled):
    """The age itself changes nothing but the order: with one batch the bytes are equal."""
    ends = []
    for old in (mixed(sampled, 3), [replace(s, age=0) for s in mixed(sampled, 3)]):
        learner = updater(learner__batch=100, learner__inner_epochs=2)
        learner.update(0, old)
        ends.append(digest(learner.policy.lora_state()))
    assert ends[0] == ends[1]


def test_a_ratio_beyond_the_clip_range_is_not_trained_on(updater, sampled, first_weights):
    """An older trajectory that has become likely enough says nothing more."""
    grown = [replace(s, advantage=1.0) for s in mixed(sampled, 0, by=-0.5)]
    learner = updater(learner__inner_epochs=1, learner__batch=100, learner__weight_decay=0)
    figures = learner.update(0, grown)
    assert figures["policy/clip_fraction"] == 1
    assert not moved(learner, first_weights)


# --- the drift ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 100])
def test_older_densities_neither_count_nor_hide_those_of_the_stages_own(
    updater, sampled, first_weights, size
):
    learner = updater(**CHECKED, learner__batch=size)
    figures = learner.update(0, mixed(sampled, 2, by=0.05))
    assert figures["policy/ratio_drift_max"] < 1e-5
    assert moved(learner, first_weights)

    wrong = [replace(s, age=1 - s.age) for s in mixed(sampled, 5, by=0.05)]
    learner = updater(**CHECKED, learner__batch=size)
    with pytest.raises(ValueError, match=r"before the update the mean .*max_ratio_drift"):
        learner.update(0, wrong)
    assert not moved(learner, first_weights)


def test_the_drift_is_the_mean_over_the_stages_own_alone(updater, sampled):
    young = [shifted(t, 0.01) for t in sampled[:3]]
    learner = updater(learner__batch=100)
    figures = learner.update(0, mixed([*young, *sampled[3:]], 3, by=0.5))
    assert figures["policy/ratio_drift"] == pytest.approx(1 - np.exp(-0.01), rel=1e-2)


def test_where_all_is_replayed_there_is_no_drift_to_refuse(updater, sampled, first_weights):
    """Every reward of the stage tied."""
    learner = updater(**CHECKED)
    figures = learner.update(0, mixed(sampled, 0))
    assert "policy/ratio_drift" not in figures
    assert all(np.isfinite(v) for v in figures.values())
    assert moved(learner, first_weights)


def test_densities_that_are_not_numbers_are_refused_beside_older_ones(updater, sampled):
    young = [shifted(t, float("nan")) for t in sampled[:2]]
    with pytest.raises(ValueError, match="ratio"):
        updater(**CHECKED).update(0, mixed([*young, *sampled[2:]], 2))
