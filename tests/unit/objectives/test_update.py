"""One stage's update (method.md §4; the released code's defects by number)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from b2ray.diffusion import lora
from b2ray.diffusion.lora_file import digest
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.schedule import Schedule
from b2ray.diffusion.trajectory import Selected, Trajectory, from_wire
from b2ray.objectives.update import MAX_SKIPPED, Updater, learning_rate
from tests.models import config, rollout, selection
from tests.unit.objectives.conftest import (
    ADVANTAGES_7,
    ANY_DRIFT,
    INTERVAL,
    ONE_STEP,
    PROMPTS_7,
    STEPS,
    gradients,
    seen_steps,
)


def weights(updater: Updater) -> str:
    return digest(updater.policy.lora_state())


@torch.no_grad()
def likelihood(updater: Updater, chosen: Selected) -> float:
    return float(log_prob(updater.policy, chosen).mean())


def log_prob(policy: Policy, chosen: Selected) -> torch.Tensor:
    """Of one trajectory's steps, shape (INTERVAL,)."""
    latents = from_wire(chosen.fetch().latents)
    i = torch.arange(STEPS - INTERVAL, STEPS)
    return policy.log_prob(i, latents[:-1], latents[1:], [chosen.prompt] * INTERVAL)


def expected_gradient(updater: Updater, selected: Sequence[Selected]) -> torch.Tensor:
    """Of the mean over all pairs of -advantage · ratio, at ratio 1, one trajectory at a time."""
    policy = updater.policy
    loss = sum(-s.advantage * log_prob(policy, s).sum() for s in selected)
    found = torch.autograd.grad(
        loss / (INTERVAL * len(selected)), list(updater.parameters.values())
    )
    return torch.cat([g.flatten() for g in found])


# --- gradients (defect 8) --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("microbatch", "count"), [(1, 1), (100, 1), (1, 5), (4, 7), (5, 7), (21, 7), (100, 7)]
)
def test_the_gradient_is_that_of_the_mean_over_the_true_count(updater, selected, microbatch, count):
    learner = updater(**ONE_STEP, learner__microbatch=microbatch)
    expected = expected_gradient(learner, selected[:count])
    learner.update(0, selected[:count])
    error = (gradients(learner) - expected).norm() / expected.norm()
    assert error < 1e-3


def test_every_trajectory_is_visited_once_a_pass_and_none_is_left_over(updater, selected):
    learner, visits = updater(learner__inner_epochs=2, learner__batch=3), []
    counted = [
        replace(s, fetch=lambda j=j, s=s: visits.append(j) or s.fetch())
        for j, s in enumerate(selected)
    ]
    figures = learner.update(0, counted)
    assert sorted(visits) == sorted([*range(7)] * 2)
    assert sorted(visits[:7]) == [*range(7)]
    assert figures["policy/updates"] == 6  # 7 in 3 parts, twice


def test_gradients_are_scaled_down_to_the_largest_norm(updater, selected):
    learner = updater(**{**ONE_STEP, "learner__max_grad_norm": 1e-3})
    figures = learner.update(0, selected)
    assert figures["policy/grad_norm"] > 1e-3
    assert float(gradients(learner).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_figures_count_per_step(updater, selected):
    figures = updater(**ONE_STEP).update(0, selected)
    steps = {n.rsplit("_", 1)[1] for n in figures if n.startswith("policy/grad_norm/step")}
    assert steps == {"01", "02", "03"}
    assert all(np.isfinite(v) for v in figures.values())


# --- direction and determinism ---------------------------------------------------------------


def test_good_trajectories_become_likelier_and_bad_ones_less_likely(updater, selected):
    learner = updater(
        learner__lr=1e-4, learner__inner_epochs=2, learner__batch=7, **{"objective__clip_nats": 1e6}
    )

    def gain() -> float:
        return sum(s.advantage * likelihood(learner, s) for s in selected)

    before = gain()
    learner.update(0, selected)
    assert gain() > before


def test_a_single_good_trajectory_becomes_likelier(updater, selected):
    learner = updater(learner__lr=1e-4)
    before = likelihood(learner, selected[0])
    learner.update(0, selected[:1])
    assert likelihood(learner, selected[0]) > before


def test_the_same_update_gives_the_same_bytes(updater, selected):
    ends = []
    for _ in range(2):
        learner = updater()
        learner.update(0, selected)
        ends.append((weights(learner), digest(learner.optimizer_state())))
    assert ends[0] == ends[1]


def test_stage_and_seed_decide_the_order(updater, selected):
    ends = set()
    for stage, seed in ((0, 0), (1, 0), (0, 1)):
        learner = updater(seed=seed)
        learner.update(stage, selected)
        ends.add(weights(learner))
    assert len(ends) == 3


def test_a_restored_updater_goes_on_as_if_nothing_had_happened(updater, selected):
    learner = updater()
    learner.update(0, selected)
    saved = learner.policy.lora_state(), learner.optimizer_state()
    learner.update(1, selected)
    undisturbed = weights(learner), digest(learner.optimizer_state())
    again = updater()
    assert again.restore(*saved) == digest(saved[0])
    assert digest(again.optimizer_state()) == digest(saved[1])
    again.update(1, selected)
    assert (weights(again), digest(again.optimizer_state())) == undisturbed


def test_restoring_the_start_forgets_the_moments(updater, selected, first_weights):
    learner = updater()
    learner.update(0, selected)
    end = weights(learner)
    learner.restore(first_weights, {})
    assert learner.optimizer_state() == {}
    learner.update(0, selected)
    assert weights(learner) == end


# --- what is not trained on ------------------------------------------------------------------


def test_an_empty_selection_updates_nothing(updater, first_weights):  # defect 1
    learner = updater()
    assert learner.update(0, []) == {"policy/updates": 0.0, "policy/rows": 0.0}
    assert weights(learner) == digest(first_weights)
    assert learner.optimizer_state() == {}


@pytest.fixture
def last_step_untrained(policy, monkeypatch) -> Schedule:
    """The policy's schedule with a last step without density, as onto an alpha of one."""
    sigma = policy.schedule.sigma.clone()
    sigma[-1] = 0
    schedule = replace(policy.schedule, sigma=sigma)
    monkeypatch.setattr(policy, "schedule", schedule)
    return schedule


def test_steps_without_density_never_appear(updater, selected, last_step_untrained):  # defect 5
    assert seen_steps(updater(), selected) == {1, 2}
    figures = updater().update(0, selected)
    assert not any(name.endswith("step_03") for name in figures)


def test_an_interval_without_any_density_updates_nothing(
    updater, selected, first_weights, last_step_untrained
):  # defect 5
    learner = updater()
    shorter = [replace(s, interval=1, fetch=lambda s=s: cut(s.fetch())) for s in selected]
    learner.update(0, shorter)
    assert weights(learner) == digest(first_weights)


def cut(trajectory: Trajectory) -> Trajectory:
    """The last step of a trajectory alone."""
    return replace(trajectory, latents=trajectory.latents[-2:], log_probs=trajectory.log_probs[-1:])


def bad(selected: list[Selected]) -> list[Selected]:
    return [replace(s, advantage=float("nan")) for s in selected]


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(updater, selected, first_weights):
    learner = updater(learner__inner_epochs=1, learner__batch=100)
    figures = learner.update(0, bad(selected))
    assert (figures["policy/updates"], figures["policy/skipped_updates"]) == (0, 1)
    assert weights(learner) == digest(first_weights)
    learner.update(1, selected)
    assert weights(learner) != digest(first_weights)
    assert all(np.isfinite(v).all() for v in learner.policy.lora_state().values())


def test_gradients_that_stay_not_finite_end_the_run(updater, selected, first_weights):
    learner = updater(learner__inner_epochs=1, learner__batch=100)
    for stage in range(MAX_SKIPPED - 1):
        learner.update(stage, bad(selected))
    with pytest.raises(ValueError, match=rf"not finite {MAX_SKIPPED} times in a row: lower"):
        learner.update(MAX_SKIPPED, bad(selected))
    assert weights(learner) == digest(first_weights)


def test_a_good_gradient_in_between_starts_the_count_again(updater, selected):
    learner = updater(learner__inner_epochs=1, learner__batch=100)
    for stage in range(2 * MAX_SKIPPED):
        learner.update(stage, bad(selected) if stage % 2 else selected)
        assert learner.skipped_in_a_row == stage % 2


def test_only_the_adapter_is_optimised(updater):
    learner = updater()
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in lora.parameters(learner.policy.pipeline.unet).values()}


# --- precision, the rate, rehearsals -----------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_small_gradients_survive_half_precision(models, first_weights, scaled):
    """Many of their float16 values lie below its smallest number, unless the loss is scaled."""
    over = {"sampling__steps": STEPS, **ONE_STEP, **ANY_DRIFT}
    over |= {"learner__recompute_log_probs": True, "learner__max_grad_norm": 1e9}
    found, sampled = {}, None
    for dtype in ("float16", "float32"):
        settings = config(models, model__dtype=dtype, **over)
        policy = Policy(settings, torch.device("cpu"))
        policy.bind(first_weights)
        sampled = sampled or rollout(policy, PROMPTS_7, INTERVAL)
        same = [replace(t, latents=t.latents.astype(dtype)) for t in sampled]
        learner = Updater(policy, settings)
        if not scaled:
            learner.loss_scale = 1.0
        learner.update(0, selection(same, PROMPTS_7, [1e-3 * a for a in ADVANTAGES_7]))
        found[dtype] = gradients(learner)
    likeness = torch.nn.functional.cosine_similarity(*found.values(), dim=0)
    assert bool(likeness > 0.99) == scaled, likeness


def test_the_rate_falls_to_nothing_after_the_last_stage(updater):
    learner = updater(learner__lr=1.0, learner__lr_schedule="linear", curriculum__stages=4)
    rates = [learning_rate(learner.config, stage) for stage in range(4)]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])
    constant = updater(learner__lr=1.0, curriculum__stages=4).config
    assert {learning_rate(constant, stage) for stage in range(4)} == {1.0}


def test_an_update_uses_its_stages_rate(updater, selected):
    def moved(stage: int) -> float:
        over = {"learner__lr_schedule": "linear", "curriculum__stages": 10}
        learner = updater(**{**ONE_STEP, **over, "learner__weight_decay": 0})
        before = torch.cat([p.detach().flatten().clone() for p in learner.parameters.values()])
        learner.update(stage, selected)
        after = torch.cat([p.detach().flatten() for p in learner.parameters.values()])
        return float((after - before).abs().max())

    assert moved(9) / moved(0) == pytest.approx(0.1, rel=0.05)  # Adam's first step is the rate


def test_a_dry_run_measures_the_drift_and_changes_nothing(updater, selected):
    learner = updater(learner__microbatch=3)
    before = weights(learner)
    drift = learner.dry_run(selected)
    assert sorted(drift) == [1, 2, 3]
    assert all(0 <= v < 1e-4 for v in drift.values())
    off = [
        replace(s, fetch=lambda s=s: replace(s.fetch(), log_probs=s.fetch().log_probs + 0.5))
        for s in selected
    ]
    assert all(
        v == pytest.approx(1 - np.exp(-0.5), rel=1e-3) for v in learner.dry_run(off).values()
    )
    assert weights(learner) == before and learner.optimizer_state() == {}
    assert all(p.grad is None for p in learner.parameters.values())


# --- the base model as a reference -------------------------------------------------------------


def test_the_divergence_is_that_of_two_normal_distributions(updater, selected):
    learner = updater()
    policy, chosen = learner.policy, selected[0]
    latents = from_wire(chosen.fetch().latents)[:-1]
    i = torch.arange(STEPS - INTERVAL, STEPS)
    with torch.no_grad():
        moved = policy.predict(i, latents, [chosen.prompt] * INTERVAL)
        with policy.reference():
            base = policy.predict(i, latents, [chosen.prompt] * INTERVAL)
    schedule = policy.schedule
    sigma = schedule.sigma[i][:, None, None, None]
    ours, theirs = (
        torch.distributions.Normal(schedule.mean(i, latents, o), sigma) for o in (moved, base)
    )
    expected = torch.distributions.kl_divergence(ours, theirs).mean((1, 2, 3))
    found = schedule.kl(i, latents, moved, base)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found.min() > 0


def test_the_divergence_alone_leads_back_to_the_base_model(updater, selected):
    still = [replace(s, advantage=0.0) for s in selected]
    over = {"objective__kl_weight": 1.0, "learner__lr": 3e-3, "learner__weight_decay": 0}
    learner = updater(**over, learner__inner_epochs=8)
    evals = learner.policy.unet_evals
    first = learner.update(0, still)["policy/kl_reference"]
    assert learner.policy.unet_evals - evals == 2 * 8 * len(selected) * INTERVAL
    later = learner.update(1, still)["policy/kl_reference"]
    assert 0 < later < 0.5 * first


def test_without_a_weight_the_base_model_is_not_asked(updater, selected):
    figures = updater(**ONE_STEP).update(0, selected)
    assert "policy/kl_reference" not in figures
