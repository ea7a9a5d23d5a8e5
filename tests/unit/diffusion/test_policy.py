"""A pipeline as a policy, against diffusers' own pipeline call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from b2ray.diffusion.policy import Policy
from b2ray.diffusion.schedule import Schedule
from b2ray.diffusion.trajectory import from_wire, to_wire
from b2ray.errors import ConfigError
from tests.models import PROMPTS, config, pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(models) -> Policy:
    return Policy(config(models, sampling__steps=6, sampling__guidance=3.0), CPU)


@pytest.fixture
def other(models, tmp_path) -> Callable[..., Policy]:
    """A policy of a pipeline with other scheduler settings or another configuration."""

    def make(scheduler: dict | None = None, **over: object) -> Policy:
        if scheduler is not None:
            pipeline(**scheduler).save_pretrained(tmp_path / "base")
            over["model.path"] = tmp_path / "base"
        return Policy(config(models, sampling__steps=6, **over), CPU)

    return make


def start(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def call_pipeline(policy: Policy, x: torch.Tensor, prompts: list[str], eta: float, seed: int = 1):
    return policy.pipeline(
        prompts,
        num_inference_steps=policy.schedule.steps,
        guidance_scale=policy.guidance,
        eta=eta,
        latents=x,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


def pipelines_noise(shape: torch.Size, seed: int = 1) -> Callable[[int], np.ndarray]:
    source = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(shape, generator=source).numpy()


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {
    **V,
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
}


# diffusers' own step is NaN for zero signal and eta 1: the root of a rounding error below zero.
@pytest.mark.parametrize(
    ("scheduler", "eta"), [({}, 0.0), ({}, 0.5), ({}, 1.0), (V, 1.0), (ZERO_SNR, 0.9)]
)
def test_denoising_is_the_pipelines_own(other, scheduler, eta):
    policy = other(scheduler)
    scheduler_config = policy.pipeline.scheduler.config
    policy.schedule = Schedule.from_config(scheduler_config, 6, eta)
    x, noise = start(2), pipelines_noise(torch.Size([2, 4, 8, 8]))
    ours = policy.denoise(x, PROMPTS[:2], 0, 6, noise).latents[:, -1]
    theirs = call_pipeline(policy, x, PROMPTS[:2], eta)
    # Their prompts are encoded as one batch and ours one at a time.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 0.5])
def test_guidance_of_one_or_less_skips_the_unconditional_half(other, monkeypatch, guidance):
    policy = other(sampling__guidance=guidance)
    rows = []
    forward = policy.pipeline.unet.forward
    monkeypatch.setattr(
        policy.pipeline.unet,
        "forward",
        lambda x, *a, **k: rows.append(len(x)) or forward(x, *a, **k),
    )
    x, noise = start(2), pipelines_noise(torch.Size([2, 4, 8, 8]))
    ours = policy.denoise(x, PROMPTS[:2], 0, 6, noise).latents[:, -1]
    assert rows == [2] * 6
    theirs = call_pipeline(policy, x, PROMPTS[:2], 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_extrapolates_from_the_unconditional_output(policy):
    i, x = torch.tensor([2, 4]), start(2)
    unet, t = policy.pipeline.unet, policy.schedule.timesteps[i]

    def plain(prompts: list[str]) -> torch.Tensor:
        return unet(x, t, encoder_hidden_states=policy.encode(prompts)[0]).sample

    with torch.no_grad():
        without, with_prompt = plain(["", ""]), plain(PROMPTS[:2])
        found = policy.predict(i, x, PROMPTS[:2])
    torch.testing.assert_close(found, without + 3.0 * (with_prompt - without))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_ratio_is_exactly_one_before_any_update(other, dtype):
    policy = other(model__dtype=dtype)
    x, noise = start(3), pipelines_noise(torch.Size([3, 4, 8, 8]))
    sampled = policy.denoise(x, PROMPTS, 2, 6, noise)
    assert sampled.latents.dtype == policy.dtype
    stored = from_wire(to_wire(sampled.latents))
    for j in range(4):
        i = torch.full((3,), 2 + j)
        again = policy.log_prob(i, stored[:, j], stored[:, j + 1], PROMPTS)
        assert (again - sampled.log_probs[:, j]).exp().tolist() == [1.0] * 3


def test_a_chain_cut_at_the_fork_is_the_whole_chain(policy):
    x, shape = start(2), torch.Size([2, 4, 8, 8])
    whole = policy.denoise(x, PROMPTS[:2], 0, 6, pipelines_noise(shape)).latents
    noise = pipelines_noise(shape)
    prefix = policy.denoise(x, PROMPTS[:2], 0, 2, noise).latents
    rest = policy.denoise(prefix[:, -1], PROMPTS[:2], 2, 6, noise).latents
    assert torch.equal(torch.cat([prefix, rest[:, 1:]], 1), whole)


def test_no_prefix_is_the_latents_themselves(policy):
    x = start(2)
    nothing = policy.denoise(x, PROMPTS[:2], 0, 0, pipelines_noise(x.shape))
    assert torch.equal(nothing.latents, x[:, None])
    assert nothing.log_probs.shape == (2, 0)
    assert nothing.predicted is None


def test_what_the_first_step_predicts_is_the_image_foreseen_there(policy):
    x = start(2)
    found = policy.denoise(x, PROMPTS[:2], 2, 6, pipelines_noise(x.shape)).predicted
    i = torch.full((2,), 2)
    a = policy.schedule.alpha[2]
    eps = policy.predict(i, x, PROMPTS[:2])
    torch.testing.assert_close(found, (x - (1 - a).sqrt() * eps) / a.sqrt())


def test_each_prompt_is_encoded_once_and_alone(other, monkeypatch):
    policy = other()
    encoder, seen = policy.pipeline.text_encoder, []
    forward = encoder.forward
    monkeypatch.setattr(
        encoder, "forward", lambda ids, *a: seen.append(len(ids)) or forward(ids, *a)
    )
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    first, _ = policy.encode(prompts)
    assert seen == [1, 1, 1]  # and the empty prompt
    policy.denoise(start(3), prompts, 0, 6, pipelines_noise(torch.Size([3, 4, 8, 8])))
    assert seen == [1, 1, 1]
    assert torch.equal(policy.encode(prompts)[0], first)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


def test_conditions_are_the_pipelines_own(policy):
    theirs, unconditional = policy.pipeline.encode_prompt(PROMPTS, CPU, 1, True)
    torch.testing.assert_close(policy.encode(PROMPTS)[0], theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.encode([None] * 3)[0], unconditional, rtol=1e-5, atol=1e-5)


def test_pictures_are_rounded_not_cut_off(other, monkeypatch):  # defect 13
    policy = other()
    levels = torch.tensor([-9.0, 0.4, 0.6, 99.4, 99.6, 254.4, 254.6, 300.0])
    values = (levels / 255 * 2 - 1).expand(1, 3, 2, 8)
    decoded = type("Decoded", (), {"sample": values})
    monkeypatch.setattr(policy.pipeline.vae, "decode", lambda _: decoded)
    pictures = policy.decode(start(1))
    assert (pictures.dtype, pictures.shape) == (np.uint8, (1, 2, 8, 3))
    assert pictures[0, 0, :, 0].tolist() == [0, 0, 1, 99, 100, 254, 255, 255]


def test_pictures_are_the_pipelines_own(policy):
    x, shape = start(2), torch.Size([2, 4, 8, 8])
    final = policy.denoise(x, PROMPTS[:2], 0, 6, pipelines_noise(shape)).latents[:, -1]
    pictures = policy.decode(final)
    theirs = policy.pipeline(
        PROMPTS[:2],
        num_inference_steps=6,
        guidance_scale=3.0,
        eta=1.0,
        latents=x,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    assert pictures.shape == theirs.shape
    assert np.abs(pictures - (theirs * 255).round()).max() <= 1


def test_everything_is_in_evaluation_mode_and_only_the_adapter_learns(policy):
    p = policy.pipeline
    assert not any(m.training for net in (p.unet, p.vae, p.text_encoder) for m in net.modules())
    learning = [n for n, v in p.unet.named_parameters() if v.requires_grad]
    assert learning
    assert all(".lora_" in n for n in learning)
    assert not any(v.requires_grad for net in (p.vae, p.text_encoder) for v in net.parameters())


def test_guided_evaluations_are_counted(other):
    policy = other()
    policy.denoise(start(3), PROMPTS, 2, 6, pipelines_noise(torch.Size([3, 4, 8, 8])))
    assert policy.unet_evals == 3 * 4


def test_prompts_that_the_tokenizer_cuts_off_are_named(policy):
    limit = policy.pipeline.tokenizer.model_max_length
    fits, too_long = "a red circle", "red " * limit
    assert policy.too_long([fits, too_long]) == [too_long]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("model_index.json", ""),
    ],
)
def test_a_model_that_does_not_load_is_a_sentence(models, tmp_path, broken, words):
    pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / broken).unlink()
    with pytest.raises(ConfigError, match=f"model.path .*cannot be loaded.*{words}") as caught:
        Policy(config(models, **{"model.path": tmp_path / "base"}), CPU)
    assert "\n" not in str(caught.value)


def test_a_hub_model_that_cannot_be_reached_is_a_sentence(models):
    with pytest.raises(ConfigError, match=r"model\.path 'nobody/nothing' cannot be loaded"):
        Policy(config(models, **{"model.path": "nobody/nothing"}), CPU)


def test_pickled_weights_are_not_loaded(models, tmp_path):
    pipeline().save_pretrained(tmp_path / "base", safe_serialization=False)
    assert list((tmp_path / "base" / "unet").glob("*.bin"))
    with pytest.raises(ConfigError, match=r"model\.path"):
        Policy(config(models, **{"model.path": tmp_path / "base"}), CPU)
