"""The policy gradient and DPO: losses by hand, gradients of whole updates, and pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from b2ray.config import Objective
from b2ray.diffusion.trajectory import from_wire
from b2ray.objectives.densities import Densities
from b2ray.objectives.dpo import dpo
from b2ray.objectives.policy_gradient import policy_gradient
from b2ray.objectives.ppo import ppo_clip
from tests.unit.objectives.conftest import INTERVAL, ONE_STEP, PROMPTS_7, STEPS, gradients

PAIRS = {
    "objective__kind": "dpo",
    "selection__require_pair": True,
    "learner__inner_epochs": 1,
    "learner__max_grad_norm": 1e9,
}


def densities(updater, chosen, reference: bool = False) -> torch.Tensor:
    """Of one trajectory's steps, shape (INTERVAL,)."""
    policy, latents = updater.policy, from_wire(chosen.fetch().latents)
    i = torch.arange(STEPS - INTERVAL, STEPS)
    prompts = [chosen.prompt] * INTERVAL
    if reference:
        with torch.no_grad(), policy.reference():
            return policy.log_prob(i, latents[:-1], latents[1:], prompts)
    return policy.log_prob(i, latents[:-1], latents[1:], prompts)


@pytest.fixture
def paired(selected) -> list:
    """Three groups' best and worst leaves, in branch order: the best is not always first."""
    same = [replace(s, prompt=PROMPTS_7[j // 2]) for j, s in enumerate(selected[:6])]
    signs = (1, -1, -1, 1, 1, -1)
    return [replace(s, advantage=float(a)) for s, a in zip(same, signs, strict=True)]


# --- the policy gradient ----------------------------------------------------------------------


def test_the_policy_gradient_is_ppos_where_the_policy_has_not_moved():
    found = []
    for loss in (policy_gradient, ppo_clip):
        log_prob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
        rows = Densities(log_prob, log_prob.detach(), torch.tensor([1.5, -0.5]))
        loss(rows, Objective(), 256)[0].sum().backward()
        found.append(log_prob.grad.tolist())
    assert found[0] == found[1] == [-1.5, 0.5]


def test_it_is_never_clipped():
    rows = Densities(torch.tensor([9.0]), torch.tensor([-9.0]), torch.tensor([1.0]))
    assert policy_gradient(rows, Objective(), 256)[1].tolist() == [False]
    assert ppo_clip(rows, Objective(), 256)[1].tolist() == [True]


def test_its_update_is_one_step_on_everything(updater, selected):
    learner = updater(**ONE_STEP, objective__kind="policy_gradient")
    loss = -sum(s.advantage * densities(learner, s).sum() for s in selected)
    expected = torch.autograd.grad(loss / (7 * INTERVAL), list(learner.parameters.values()))
    figures = learner.update(0, selected)
    assert figures["policy/updates"] == 1
    assert figures["policy/clip_fraction"] == 0
    torch.testing.assert_close(
        gradients(learner), torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-7
    )


# --- DPO --------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 256])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_by_hand(elements, beta):
    """Gains over the base model of 3 and 1 nats: a margin of 2."""
    log_prob = torch.tensor([3.0, 1.0], dtype=torch.float64) / elements + 7
    log_prob.requires_grad_()
    base = torch.full((2,), 7.0, dtype=torch.float64)
    rows = Densities(log_prob, base, torch.tensor([1.0, -1.0]), base)
    loss, clipped = dpo(rows, Objective(kind="dpo", beta=beta), elements)
    expected = math.log1p(math.exp(-2 * beta)) / (beta * elements)
    assert loss.tolist() == pytest.approx([expected] * 2)
    assert clipped.tolist() == [False, False]
    loss.sum().backward()
    # The more the best one is preferred already, the less there is to learn.
    slope = 2 / (1 + math.exp(2 * beta))
    assert log_prob.grad.tolist() == pytest.approx([-slope, slope])


def test_dpos_first_gradient_is_that_of_advantages_of_one():
    log_prob = torch.zeros(4, requires_grad=True)
    rows = Densities(log_prob, torch.zeros(4), torch.ones(4), torch.zeros(4))
    dpo(rows, Objective(kind="dpo"), 256)[0].sum().backward()
    assert log_prob.grad.tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("microbatch", [1, 4, 5, 100])
def test_an_update_on_pairs_is_the_mean_over_groups_and_steps(updater, paired, microbatch):
    """Whatever the microbatch: a step of the best leaf is with the same step of the worst one."""
    over = {**PAIRS, "learner__batch": "all", "learner__microbatch": microbatch}
    learner = updater(**over, objective__beta=0.5)
    losses = []
    for j in range(0, 6, 2):
        best, worst = sorted(paired[j : j + 2], key=lambda s: -s.advantage)
        gains = [densities(learner, s) - densities(learner, s, True) for s in (best, worst)]
        margin = learner.elements * (gains[0] - gains[1])
        losses.append(-torch.nn.functional.logsigmoid(0.5 * margin) / (0.5 * learner.elements))
    expected = torch.autograd.grad(torch.cat(losses).mean(), list(learner.parameters.values()))
    learner.update(0, paired)
    torch.testing.assert_close(
        gradients(learner), torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-7
    )


def test_the_preferred_leaves_become_likelier_than_the_others(updater, paired):
    learner = updater(**PAIRS, learner__batch=2, learner__lr=1e-4)

    def margin() -> float:
        with torch.no_grad():
            return sum(s.advantage * float(densities(learner, s).sum()) for s in paired)

    before = margin()
    figures = learner.update(0, paired)
    assert figures["policy/updates"] == 3
    assert margin() > before


def test_what_is_no_pair_is_refused(updater, paired, selected):
    learner = updater(**PAIRS)
    for bad in (paired[:3], selected[:2]):
        with pytest.raises(ValueError, match="the best and the worst leaf of every group"):
            learner.update(0, bad)


# --- rows -------------------------------------------------------------------------------------


def test_trajectories_of_different_intervals_are_in_one_batch(updater, selected):
    """As those of earlier stages are: each is trained on its own steps, all steps count alike."""
    last = replace(
        selected[1],
        interval=1,
        fetch=lambda: replace(
            selected[1].fetch(),
            latents=selected[1].fetch().latents[-2:],
            log_probs=selected[1].fetch().log_probs[-1:],
        ),
    )
    learner = updater(**ONE_STEP)
    whole, end = (densities(learner, s) for s in selected[:2])
    loss = -(selected[0].advantage * whole.sum() + selected[1].advantage * end[-1])
    expected = torch.autograd.grad(loss / (INTERVAL + 1), list(learner.parameters.values()))
    learner.update(0, [selected[0], last])
    torch.testing.assert_close(
        gradients(learner), torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-7
    )
