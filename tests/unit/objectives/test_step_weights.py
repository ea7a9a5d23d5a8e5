"""What each denoising step counts in an update (defect 12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from b2ray.diffusion.trajectory import from_wire
from b2ray.objectives.batch import batch_of
from b2ray.objectives.steps import SampledSteps
from tests.unit.objectives.conftest import INTERVAL, ONE_STEP, STEPS, gradients, seen_steps


def test_inverse_weights_give_every_step_the_same_say(updater):
    """The gradient of a step's log-density by the predicted noise, times the step's weight."""
    learner = updater(objective__step_weights="inverse_gradient")
    table = learner.policy.schedule
    i = torch.arange(STEPS)
    x = torch.randn(STEPS, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    output = torch.zeros_like(x, requires_grad=True)
    one_sigma = table.mean(i, x, output).detach() + table.sigma[:, None, None, None]
    table.log_prob(i, x, output, one_sigma).sum().backward()
    says = output.grad.abs().mean(dim=(1, 2, 3)) * learner.step_weights
    assert says.numpy() == pytest.approx(np.full(STEPS, float(says[0])), rel=1e-3)
    assert float(learner.step_weights.mean()) == pytest.approx(1)


def test_steps_weigh_alike_unless_asked(updater, selected):
    assert updater().step_weights.tolist() == [1.0] * STEPS
    weighted = updater(**ONE_STEP, objective__step_weights="inverse_gradient")
    weighted.update(0, selected)
    found = gradients(weighted)
    plain = updater(**ONE_STEP)
    plain.update(0, selected)
    assert not torch.allclose(found, gradients(plain), rtol=1e-2)


def test_weights_by_noise_are_the_list_of_how_far_it_moves_the_picture(updater, selected):
    """Noise of a step's sigma in x_t' = sqrt(a_t') x0 + …, over sqrt(a_t')."""
    table = updater().policy.schedule
    reach = [float(s) / float(a) ** 0.5 for s, a in zip(table.sigma, table.alpha_next, strict=True)]
    assert reach == sorted(reach, reverse=True)
    by_list = gradients_with(updater, selected, step_weights=reach)
    by_name = gradients_with(updater, selected, step_weights="noise")
    torch.testing.assert_close(by_name, by_list)


def gradients_with(updater, selected, **objective: object) -> torch.Tensor:
    over = {f"objective__{k}": v for k, v in objective.items()}
    learner = updater(**ONE_STEP, **over, curriculum__start=INTERVAL)
    learner.update(0, selected)
    return gradients(learner)


def test_a_list_says_how_much_each_step_counts(updater, selected):
    """The gradient is the sum of the single steps' by the list; all ones are inverse_gradient."""
    lists = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    # Each alone is scaled to a mean of 1 over four steps, and divided by its own rows alone.
    scale = 1 / updater(objective__step_weights="inverse_gradient").policy.schedule.sensitivity()
    singles = [
        gradients_with(updater, selected, step_weights=one) * float(scale[j + 1] / scale.sum())
        for j, one in enumerate(lists)
    ]
    mixed = gradients_with(updater, selected, step_weights=[0, 3, 0, 1])
    expected = (3 * singles[0] + singles[2]) * float(scale.sum() / (3 * scale[1] + scale[3])) / 2
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-7)
    alike = gradients_with(updater, selected, step_weights=[1, 1, 1, 1])
    inverse = gradients_with(updater, selected, step_weights="inverse_gradient")
    torch.testing.assert_close(alike, inverse)
    torch.testing.assert_close(alike, sum(singles) / 3, rtol=1e-3, atol=1e-7)


def test_a_step_without_weight_is_left_out_unless_something_holds_it(updater, selected):
    weights = {"objective__step_weights": [0, 1, 0, 1], "curriculum__start": INTERVAL}
    assert seen_steps(updater(**weights), selected) == {1, 3}
    assert seen_steps(updater(**weights, objective__kl_weight=0.1), selected) == {1, 2, 3}


def test_steps_can_be_weighed_by_how_far_they_move_the_latents(selected):
    whole = SampledSteps.all_of(range(STEPS - INTERVAL, STEPS))
    rows = batch_of([(s, whole) for s in selected[:2]], STEPS, None, torch.device("cpu"))
    for j, chosen in enumerate(selected[:2]):
        latents = from_wire(chosen.fetch().latents)
        moved = ((latents[1:] - latents[:-1]) ** 2).mean((1, 2, 3))
        own = rows.weight[j::2]
        assert float(own.mean()) == pytest.approx(1)
        torch.testing.assert_close(own, moved / moved.mean())


def test_such_weights_reach_the_gradient(updater, selected):
    found = []
    for kind in ("none", "displacement"):
        learner = updater(**ONE_STEP, objective__step_weights=kind)
        learner.update(0, selected)
        found.append(gradients(learner))
    assert not torch.allclose(*found, rtol=1e-2)
