"""Which of a trajectory's steps an update is computed on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from b2ray.algorithm.cost import plan_cost
from b2ray.objectives.steps import SampledSteps, chances, draw, trained_steps
from b2ray.objectives.update import Updater
from tests.models import config
from tests.unit.objectives.conftest import INTERVAL, ONE_STEP, STEPS, gradients

SIZES = [4.0, 2.0, 1.0, 0.5, 0.5]


def test_only_wide_steps_of_the_interval_are_trained():
    assert trained_steps(3, [True, True, False, True, False]) == [3]
    assert trained_steps(9, [True, True]) == [0, 1]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        (2, [1, 0.5, 0.25, 0.125, 0.125]),
        # The first two are certain; the others share what is left.
        (3, [1, 1, 0.5, 0.25, 0.25]),
        (4, [1, 1, 1, 0.5, 0.5]),
    ],
)
def test_chances_are_in_proportion_up_to_certainty(count, expected):
    assert chances(SIZES, count) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_draw_has_its_count_and_estimates_the_sum(count):
    values = np.array([3.0, -1.0, 2.0, 5.0, 0.25])
    random, found = np.random.default_rng(0), []
    for _ in range(4000):
        drawn = draw([10, 11, 12, 13, 14], SIZES, count, random)
        assert len(set(drawn.steps)) == count and list(drawn.steps) == sorted(drawn.steps)
        places = [step - 10 for step in drawn.steps]
        assert drawn.scale == pytest.approx(1 / chances(SIZES, count)[places])
        found.append(float(values[places] @ drawn.scale))
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(found) == pytest.approx(values.sum(), abs=4 * error + 1e-9)


def test_all_steps_are_all_steps():
    assert draw([3, 4], [1.0, 0.0], 2, np.random.default_rng(0)) == SampledSteps.all_of([3, 4])


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_the_mean_gradient_is_that_of_all_steps(updater, selected, kl_weight):
    over = {
        **ONE_STEP,
        "objective__kl_weight": kl_weight,
        "objective__step_weights": "inverse_gradient",
    }
    whole = updater(**over)
    whole.update(0, selected)
    expected, found, size = gradients(whole), [], 0.0
    for stage in range(60):  # keys the draw
        learner = updater(**over, learner__timestep_fraction=0.34)
        figures = learner.update(stage, selected)
        assert figures["policy/rows"] == len(selected)  # one of three steps each
        found.append(gradients(learner))
        size += float((found[-1] - expected).norm()) / 60
    off = float((torch.stack(found).mean(0) - expected).norm())
    # Independent errors of this size average to an eighth of it; a bias would stay.
    assert size > 0.05 * float(expected.norm())
    assert off < 2 * size / 60**0.5


def drawn(learner: Updater, selected, stage: int, epoch: int = 0) -> list[SampledSteps]:
    units = learner._units(selected)
    return [unit[0][1] for unit in learner._sample_steps(units, stage, epoch)]


def test_a_draw_is_the_same_again_and_another_in_another_pass(updater, selected):
    learner = updater(learner__timestep_fraction=0.34)
    first = drawn(learner, selected, 2)
    assert first == drawn(updater(learner__timestep_fraction=0.34), selected, 2)
    assert first != drawn(learner, selected, 2, epoch=1) != drawn(learner, selected, 3)


def test_both_leaves_of_a_pair_are_trained_on_the_same_steps(updater, selected):
    pair = [selected[0], selected[3]]
    learner = updater(
        learner__timestep_fraction=0.34,
        objective__kind="dpo",
        selection__require_pair=True,
    )
    assert pair[0].prompt == pair[1].prompt
    ((best, worst),) = learner._sample_steps(learner._units(pair), 0, 0)
    assert best[1] == worst[1] and len(best[1].steps) == 1


def test_steps_with_larger_gradients_are_drawn_more_often(updater):
    weights = [0.0, 8.0, 1.0, 1.0]
    plain = updater(objective__step_weights=weights)
    assert plain.step_sizes == pytest.approx([0.0, 0.8, 0.1, 0.1])
    held = updater(objective__step_weights=weights, objective__kl_weight=0.1)
    assert held.step_sizes == pytest.approx([0.125, 0.525, 0.175, 0.175])


def test_the_plan_counts_drawn_steps(models):
    over = {"sampling__steps": STEPS, "curriculum__start": INTERVAL, "curriculum__end": INTERVAL}
    whole = plan_cost(config(models, **over))
    third = plan_cost(config(models, **over, learner__timestep_fraction=0.34))
    assert third.unet_evals_learning * INTERVAL == whole.unet_evals_learning
    assert third.unet_evals_sampling == whole.unet_evals_sampling
