"""PPO-clip by hand."""

from __future__ import annotations

import math

import pytest
import torch

from b2ray.config import Objective
from b2ray.objectives.densities import Densities
from b2ray.objectives.ppo import ppo_clip


def one(ratio: float, advantage: float, clip: float = 0.2) -> tuple[float, float, bool]:
    """(loss, its gradient by the log-probability, clipped) of a single pair."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64)
    given = torch.tensor([advantage], dtype=torch.float64)
    rows = Densities(log_prob, old, given)
    loss, clipped = ppo_clip(rows, Objective(clip_nats=clip), 1)
    loss.sum().backward()
    return loss.item(), log_prob.grad.item(), bool(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # Beyond the range on the side that the advantage wants: no more gradient.
        (1.5, 2.0, -1.2 * 2.0, 0.0, True),
        (0.5, -2.0, 0.8 * 2.0, 0.0, True),
        # Beyond it on the other side: the full gradient, back towards the range.
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0, False),
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0, False),
        # Inside.
        (1.1, 2.0, -1.1 * 2.0, -1.1 * 2.0, False),
        (0.9, -2.0, 0.9 * 2.0, 0.9 * 2.0, False),
    ],
)
def test_loss_and_gradient(ratio, advantage, loss, gradient, clipped):
    found = one(ratio, advantage)
    assert found[:2] == pytest.approx((loss, gradient))
    assert found[2] is clipped


@pytest.mark.parametrize("advantage", [3.0, -3.0])
def test_the_first_gradient_is_the_policy_gradient(advantage):
    assert one(1.0, advantage) == (-advantage, -advantage, False)


def test_no_advantage_no_gradient():
    assert one(1.5, 0.0)[1:] == (0.0, False)


def test_a_ddpo_range_clips_what_the_released_one_does_not():
    assert one(1.001, 1.0, clip=1e-4)[2]
    assert not one(1.001, 1.0, clip=0.1)[2]


def test_rows_are_independent():
    log_prob = torch.tensor([0.5, -0.5, 0.0])
    advantage = torch.tensor([1.0, 1.0, -2.0])
    rows = Densities(log_prob, torch.zeros(3), advantage)
    loss, clipped = ppo_clip(rows, Objective(clip_nats=0.2), 1)
    assert loss.shape == clipped.shape == (3,)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -math.exp(-0.5), 2.0]))
    assert clipped.tolist() == [True, False, False]


@pytest.mark.parametrize("elements", [256, 16_384])
def test_the_range_is_nats_of_a_whole_step_on_a_latent_of_any_size(elements):
    """The same change of a step's joint likelihood is clipped, however many elements share it."""
    nats = torch.tensor([1.5, 1.7, -1.5, -1.8])
    rows = Densities(nats / elements, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    assert ppo_clip(rows, Objective(clip_nats=1.6384), elements)[1].tolist() == [False, True] * 2
