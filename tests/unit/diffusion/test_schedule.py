"""The stochastic DDIM step against diffusers' own, and its density against torch's."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from b2ray.diffusion.schedule import MIN_SIGMA, Schedule
from b2ray.errors import ConfigError
from tests.models import SCHEDULER

SD = {**SCHEDULER, "clip_sample": False, "set_alpha_to_one": False}
# What Stable Diffusion 1.4 has in scheduler/scheduler_config.json.
PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def draws(seed: int, rows: int, count: int = 3) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 4, 4, generator=source) for _ in range(count)]


def compare_with_diffusers(config: dict, steps: int, eta: float, seed: int = 0) -> None:
    """Every step of the chain, all at once, equals `DDIMScheduler.step` with the same noise."""
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    ours = Schedule.from_config(scheduler.config, steps, eta)
    assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
    x, output, noise = draws(seed, steps)
    found, _ = ours.step(torch.arange(steps), x, output, noise)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(
            output[i : i + 1], t, x[i : i + 1], eta=eta, variance_noise=noise[i : i + 1]
        )
        # x0 = (x - …) / sqrt(a) is large where a is small: compared relative to that scale.
        scale = max(1.0, float(theirs.pred_original_sample.abs().max()))
        torch.testing.assert_close(
            found[i : i + 1], theirs.prev_sample, rtol=1e-6, atol=1e-6 * scale
        )


def test_a_step_is_diffusers_own(subtests):
    choices = {
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "set_alpha_to_one": [True, False],
    }
    for values in product(*choices.values()):
        config = dict(zip(choices, values, strict=True))
        with subtests.test(**config):
            compare_with_diffusers({**SD, **config}, steps=20, eta=1.0)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(4, 50),
    eta=st.floats(0.2, 1.0),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    to_one=st.booleans(),
    clip=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_step_is_diffusers_own_for_any_settings(
    steps, eta, prediction, spacing, to_one, clip, seed
):
    config = {
        **SD,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "set_alpha_to_one": to_one,
        "clip_sample": clip,
    }
    compare_with_diffusers(config, steps, eta, seed)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_schedule_of_zero_terminal_snr_with_v_prediction(spacing):
    config = {
        **SD,
        "prediction_type": "v_prediction",
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": True,
    }
    # On some processors diffusers' own step is NaN at eta 1: the root of a rounding error below
    # zero.
    compare_with_diffusers(config, steps=20, eta=0.999)
    x, output, noise = draws(0, 20)
    samples, _ = Schedule.from_config(config, 20, 1.0).step(torch.arange(20), x, output, noise)
    assert samples.isfinite().all()


def test_eta_zero_takes_no_noise_and_trains_nothing():
    schedule = Schedule.from_config(SD, 20, 0.0)
    i = torch.arange(20)
    x, output, noise = draws(0, 20)
    assert torch.equal(
        schedule.step(i, x, output, noise)[0], schedule.step(i, x, output, 9 * noise)[0]
    )
    assert not any(schedule.trainable)


# --- densities -------------------------------------------------------------------------------


def normal_log_prob(schedule: Schedule, i, x, output, next_latents) -> torch.Tensor:
    mean, sigma = schedule.mean(i, x, output), schedule.sigma[i][:, None, None, None]
    return torch.distributions.Normal(mean, sigma).log_prob(next_latents.float()).mean((1, 2, 3))


def test_the_density_is_the_mean_of_the_elements_normal_densities():
    schedule = Schedule.from_config(SD, 20, 1.0)
    i = torch.arange(20)
    x, output, noise = draws(1, 20)
    next_latents, log_prob = schedule.step(i, x, output, noise)
    expected = normal_log_prob(schedule, i, x, output, next_latents)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
    elsewhere = next_latents + 0.01
    found = schedule.log_prob(i, x, output, elsewhere)
    expected = normal_log_prob(schedule, i, x, output, elsewhere)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mixed_timesteps_in_one_batch_are_each_step_alone():
    schedule = Schedule.from_config(SD, 20, 1.0)
    i = torch.tensor([19, 0, 7, 7, 3])
    x, output, noise = draws(2, 5)
    next_latents, log_prob = schedule.step(i, x, output, noise)
    for row in range(5):
        one = slice(row, row + 1)
        alone, density = schedule.step(i[one], x[one], output[one], noise[one])
        assert torch.equal(alone, next_latents[one])
        assert torch.equal(density, log_prob[one])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_stored_sample_scores_exactly_as_it_was_sampled(dtype):  # defect 6
    schedule = Schedule.from_config(SD, 20, 1.0)
    i = torch.arange(20)
    x, output, noise = draws(3, 20)
    x = x.to(dtype)
    next_latents, log_prob = schedule.step(i, x, output, noise)
    assert next_latents.dtype == dtype
    assert log_prob.dtype == torch.float32
    assert torch.equal(schedule.log_prob(i, x, output, next_latents), log_prob)


def test_the_density_has_the_gradient_of_a_normal():
    schedule = Schedule.from_config(SD, 20, 1.0)
    i = torch.arange(20)
    x, output, noise = draws(4, 20)
    next_latents, _ = schedule.step(i, x, output, noise)
    ours, theirs = (output.clone().requires_grad_() for _ in range(2))
    schedule.log_prob(i, x, ours, next_latents).sum().backward()
    normal_log_prob(schedule, i, x, theirs, next_latents).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


# --- steps without a density (defects 4 and 5) -----------------------------------------------


def test_a_last_step_onto_the_image_is_sampled_but_not_trained():
    # An offset of 0 ends at timestep 0, from which the next is beyond the table: alpha is one.
    config = {**SD, "set_alpha_to_one": True, "steps_offset": 0}
    schedule = Schedule.from_config(config, 20, 1.0)
    assert schedule.alpha_next[-1] == 1
    assert schedule.sigma[-1] == 0
    assert schedule.trainable == (True,) * 19 + (False,)
    i = torch.tensor([19])
    x, output, noise = draws(5, 1)
    next_latents, log_prob = schedule.step(i, x, output, noise)
    torch.testing.assert_close(next_latents, schedule.predicted_image(i, x, output)[0])
    assert log_prob.tolist() == [0.0]
    guess = output.clone().requires_grad_()
    schedule.log_prob(i, x, guess, next_latents + 1).sum().backward()
    assert torch.equal(guess.grad, torch.zeros_like(guess))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
def test_the_final_alpha_is_chosen_where_the_next_timestep_is_negative(offset, to_one):
    config = {**SD, "set_alpha_to_one": to_one, "steps_offset": offset}
    schedule = Schedule.from_config(config, 20, 1.0)
    final = 1.0 if to_one else float(DDIMScheduler(**SD).alphas_cumprod[0])
    assert schedule.timesteps[-1] == offset  # 0 - 50 and 1 - 50 are both negative
    assert schedule.alpha_next[-1] == pytest.approx(final, abs=1e-7)


def test_a_sigma_below_the_limit_is_sampled_but_not_trained():
    schedule = Schedule.from_config(SD, 20, 1e-3)
    assert 0 < schedule.sigma[-1] < MIN_SIGMA
    assert schedule.trainable == tuple((schedule.sigma >= MIN_SIGMA).tolist())
    assert any(schedule.trainable)
    assert not schedule.trainable[-1]
    i = torch.tensor([19])
    x, output, noise = draws(6, 1)
    next_latents, log_prob = schedule.step(i, x, output, noise)
    assert not torch.equal(next_latents, schedule.mean(i, x, output))
    assert log_prob.tolist() == [0.0]


def test_densities_are_finite_on_every_schedule():
    for to_one in (True, False):
        schedule = Schedule.from_config({**SD, "set_alpha_to_one": to_one}, 50, 1.0)
        x, output, noise = draws(7, 50)
        next_latents, log_prob = schedule.step(torch.arange(50), x, output, noise)
        assert next_latents.isfinite().all()
        assert log_prob.isfinite().all()


# --- scheduler configurations ----------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_stable_diffusions_pndm_configuration_does_not_clip(named):
    config = dict(PNDM)
    if not named:
        del config["clip_sample"]
    schedule = Schedule.from_config(config, 20, 1.0)
    assert schedule.clip_x0 is None
    assert schedule.timesteps.tolist() == list(range(951, 0, -50))
    x0, _ = schedule.predicted_image(
        torch.tensor([0]), torch.full((1, 4, 2, 2), 50.0), torch.zeros(1, 4, 2, 2)
    )
    assert x0.min() > 100


def test_a_model_that_clips_does_clip():
    schedule = Schedule.from_config({**SD, "clip_sample": True, "clip_sample_range": 2.0}, 20, 1.0)
    x0, _ = schedule.predicted_image(
        torch.tensor([0]), torch.full((1, 4, 2, 2), 50.0), torch.zeros(1, 4, 2, 2)
    )
    assert x0.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("config", "steps", "words"),
    [
        ({**SD, "thresholding": True}, 20, "thresholding"),
        ({**SD, "prediction_type": "flow"}, 20, "prediction_type='flow'"),
        (SD, 1001, "sampling.steps is 1001"),
        # With Stable Diffusion's offset of 1 the first of 1000 timesteps is beyond the table.
        (SD, 1000, "sampling.steps is 1000"),
    ],
)
def test_what_has_no_density_is_refused(config, steps, words):
    with pytest.raises(ConfigError, match=words):
        Schedule.from_config(config, steps, 1.0)


def test_a_schedule_moves_whole():
    schedule = Schedule.from_config(SD, 20, 1.0)
    moved = schedule.to("cpu")
    assert moved.steps == 20
    assert math.isclose(float(moved.sigma.sum()), float(schedule.sigma.sum()))
    assert (moved.prediction, moved.clip_x0) == ("epsilon", None)
