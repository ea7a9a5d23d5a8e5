"""From a picture to a trajectory: the posterior by hand, and densities that the learner repeats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.schedule import Schedule
from b2ray.diffusion.trajectory import from_wire, to_wire
from tests.models import PROMPTS, SCHEDULER, ZERO_SNR, config, pipeline

CPU = torch.device("cpu")
SD = {**SCHEDULER, "clip_sample": False, "set_alpha_to_one": False}
TO_IMAGE = {**SD, "set_alpha_to_one": True, "steps_offset": 0}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the posterior ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [SD, {**SD, **ZERO_SNR}], ids=["sd", "zero snr"])
def test_with_eta_one_it_is_ddpms_posterior(scheduler):
    """arXiv 2006.11239, equation 7, computed in double precision."""
    schedule = Schedule.from_config(scheduler, 20, 1.0)
    i, x, x0 = torch.arange(20), randn(20, 4, 8, 8), randn(20, 4, 8, 8, seed=1)
    a, a_next = (v.double()[:, None, None, None] for v in (schedule.alpha, schedule.alpha_next))
    alpha = a / a_next
    beta = 1 - alpha
    mean = (a_next.sqrt() * beta * x0 + alpha.sqrt() * (1 - a_next) * x) / (1 - a)
    # The root of a small difference: what float32 leaves of it.
    torch.testing.assert_close(schedule.posterior(i, x, x0).double(), mean, rtol=1e-4, atol=2e-3)
    spread = ((1 - a_next) / (1 - a) * beta).sqrt().flatten()
    torch.testing.assert_close(schedule.sigma.double(), spread, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_every_step_keeps_the_marginals(eta):
    """x_t of q(x_t | x_0) becomes x_t' of q(x_t' | x_0): mean and spread, step by step."""
    schedule = Schedule.from_config(SD, 10, eta)
    i, shape = torch.arange(10), (10, 4, 64, 64)
    x0 = torch.full(shape, 1.5)
    x = schedule.noised(i, x0, randn(*shape))
    next_latents = schedule.draw(
        i, schedule.posterior(i, x, x0), randn(*shape, seed=1), torch.float32
    )
    for j in range(10):
        for found, a in ((x[j], schedule.alpha[j]), (next_latents[j], schedule.alpha_next[j])):
            spread = float((1 - a).sqrt())
            # 16 384 elements: the mean is known to 1/128 of the spread, the spread to 1/181.
            assert float(found.mean() - 1.5 * a.sqrt()) == pytest.approx(0, abs=4 * spread / 128)
            assert float(found.std()) == pytest.approx(spread, rel=4 / 181)


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("scheduler", [SD, TO_IMAGE], ids=["sd", "to the image"])
def test_a_chain_ends_at_the_picture(scheduler, first):
    schedule = Schedule.from_config(scheduler, 10, 1.0)
    x0 = randn(2, 4, 8, 8)
    x = schedule.noised(torch.full((2,), first), x0, randn(2, 4, 8, 8, seed=9))
    for j in range(first, 10):
        i = torch.full((2,), j)
        noise = randn(2, 4, 8, 8, seed=10 + j)
        x = schedule.draw(i, schedule.posterior(i, x, x0), noise, torch.float32)
    left = (1 - schedule.alpha_next[-1]).sqrt()  # what noise the schedule ends with
    assert float((x - x0).abs().max()) <= 6 * float(left) + 1e-6
    assert float(left) < 0.05


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_policy_that_knows_the_picture_is_the_posterior(prediction):
    schedule = Schedule.from_config({**SD, "prediction_type": prediction}, 10, 1.0)
    i, x0, noise = torch.arange(10), randn(10, 4, 8, 8), randn(10, 4, 8, 8, seed=1)
    x, a = schedule.noised(i, x0, noise), schedule.alpha[i][:, None, None, None]
    knows = {
        "epsilon": noise,
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0,
        "sample": x0,
    }[prediction]
    posterior = schedule.posterior(i, x, x0)
    torch.testing.assert_close(schedule.mean(i, x, knows), posterior, rtol=1e-4, atol=1e-4)
    assert float(schedule.kl_of_posterior(i, x, knows, x0).max()) < 1e-6
    other = knows + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior, schedule.sigma[:, None, None, None]),
        torch.distributions.Normal(schedule.mean(i, x, other), schedule.sigma[:, None, None, None]),
    ).mean((1, 2, 3))
    torch.testing.assert_close(schedule.kl_of_posterior(i, x, other, x0), expected)


# --- trajectories ----------------------------------------------------------------------------

STEPS = 6


def demonstrate(policy: Policy, x0: torch.Tensor, first: int):
    leaves = [(group, PREFIX + 1) for group in range(len(x0))]

    def noise(word: int) -> np.ndarray:
        return normal(0, Domain.DEMONSTRATE, 0, leaves, word, policy.latent_shape)

    prompts = PROMPTS[: len(x0)]
    start = noise(INITIAL)
    return policy.demonstrate(x0, prompts, first, start, lambda step: noise(step + 1))


@pytest.fixture(scope="module")
def policy(models) -> Policy:
    return Policy(config(models, sampling__steps=STEPS), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_ratio_is_exactly_one_before_any_update(models, dtype):
    policy = Policy(config(models, sampling__steps=STEPS, model__dtype=dtype), CPU)
    made, _ = demonstrate(policy, randn(3, 4, 8, 8), 2)
    assert made.latents.dtype == policy.dtype and made.log_probs.dtype == torch.float32
    assert made.latents.shape == (3, 5, 4, 8, 8) and made.log_probs.shape == (3, 4)
    stored = from_wire(to_wire(made.latents))
    for j in range(4):
        i = torch.full((3,), 2 + j)
        again = policy.log_prob(i, stored[:, j], stored[:, j + 1], PROMPTS)
        assert torch.equal(again, made.log_probs[:, j])


def test_it_leads_to_its_picture_and_costs_what_sampling_costs(policy):
    x0, evals = randn(2, 4, 8, 8), policy.unet_evals
    made, apart = demonstrate(policy, x0, 1)
    assert policy.unet_evals - evals == 2 * (STEPS - 1)
    assert float((made.latents[:, -1] - x0).abs().max()) < 0.3
    assert apart.shape == (2,) and float(apart.min()) > 0
    alone, _ = demonstrate(policy, x0[:1], 1)
    torch.testing.assert_close(alone.latents[0], made.latents[0])


def test_a_policy_that_overflows_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy, "predict", lambda i, x, prompts: torch.full_like(x, torch.inf))
    with pytest.raises(ValueError, match=r"densities of demonstrations are not finite.*float32"):
        demonstrate(policy, randn(1, 4, 8, 8), 0)


# --- pictures --------------------------------------------------------------------------------


def pictures(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_latents_are_the_pipelines_own(policy):
    found = policy.latents_of(pictures())
    pipe = policy.pipeline
    with torch.no_grad():
        ready = pipe.image_processor.preprocess([Image.fromarray(p) for p in pictures()])
        theirs = pipe.vae.encode(ready).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert found.dtype == torch.float32 and found.shape == (2, 4, 8, 8)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)


def test_a_vae_that_overflows_in_float16_is_used_in_float32(models, tmp_path, monkeypatch):
    base = pipeline()
    base.vae.config.force_upcast = False
    base.save_pretrained(tmp_path / "base")
    over = {"model__dtype": "float16", "model__vae_dtype": "float16"}
    policy = Policy(config(models, **{"model.path": tmp_path / "base"}, **over), CPU)
    vae, seen = policy.pipeline.vae, []
    encode = vae.encode

    def overflowing(x: torch.Tensor):
        seen.append(x.dtype)
        found = encode(x)
        if x.dtype == torch.float16:
            found.latent_dist.mean.fill_(torch.inf)
        return found

    monkeypatch.setattr(vae, "encode", overflowing)
    assert policy.latents_of(pictures(1)).isfinite().all()
    assert seen == [torch.float16, torch.float32] and vae.dtype == torch.float16
    monkeypatch.setattr(vae, "encode", lambda x: encode(x * torch.nan))
    with pytest.raises(ValueError, match="a demonstration are not finite"):
        policy.latents_of(pictures(1))
