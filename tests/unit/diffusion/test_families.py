"""Stable Diffusion 1.x, 2.x and XL as policies, against diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from b2ray.diffusion.noise import INITIAL, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.errors import ConfigError
from tests.models import PROMPTS, SCHEDULER, ZERO_SNR, config, pipeline, sdxl

CPU = torch.device("cpu")
STEPS = 5
FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": pipeline,
    "sd2": lambda: pipeline(prediction_type="v_prediction"),
    "sd2_zero_snr": lambda: pipeline(**ZERO_SNR),
    "sdxl": sdxl,
    "sdxl_encoded_nothing": lambda: sdxl(force_zeros=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, saved when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str):
        if not (root / name).exists():
            FAMILIES[name]().save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def new_policy(models, folders) -> Callable[..., Policy]:
    """A policy of one's own; keywords are configuration."""

    def make(name: str, **over: object) -> Policy:
        over = {"sampling__steps": STEPS, "sampling__guidance": 3.0, **over}
        return Policy(config(models, model__path=folders(name), **over), CPU)

    return make


@pytest.fixture(scope="module")
def policy(new_policy) -> Callable[..., Policy]:
    """One policy for all tests that ask for the same settings: they leave it as it was."""
    made: dict[str, Policy] = {}

    def get(name: str, **over: object) -> Policy:
        settings = {"sampling__eta": 1.0, "model__dtype": "float32", **over}
        key = f"{name} {sorted(settings.items())}"
        if key not in made:
            made[key] = new_policy(name, **settings)
        return made[key]

    return get


def start(policy: Policy, rows: int = 2) -> torch.Tensor:
    leaves = [(row, 0) for row in range(rows)]
    return torch.from_numpy(normal(7, Domain.TRAIN, 0, leaves, INITIAL, policy.latent_shape))


def noise_of(seed: int, shape: torch.Size) -> Callable[[int], np.ndarray]:
    source = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(shape, generator=source).numpy()


def diffusers_own(policy: Policy, x: torch.Tensor, eta: float, output: str, **more: object):
    """The pipeline's own call on the scheduler that b2ray samples with, adapters included."""
    pipe, own = policy.pipeline, policy.pipeline.scheduler
    pipe.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False)
    height, width = policy.picture_size
    try:
        return pipe(
            PROMPTS[: len(x)],
            num_inference_steps=STEPS,
            guidance_scale=policy.guidance,
            eta=eta,
            latents=x,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(1),
            output_type=output,
            **more,
        ).images
    finally:
        pipe.scheduler = own


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_noise_gives_diffusers_own_picture(policy, name):
    # diffusers' own step is NaN for zero signal and eta 1: the root of a rounding error below zero.
    eta = 0.9 if name == "sd2_zero_snr" else 1.0
    ours = policy(name, sampling__eta=eta)
    x = start(ours)
    latents = ours.denoise(x, PROMPTS[:2], 0, STEPS, noise_of(1, x.shape)).latents[:, -1]
    theirs = diffusers_own(ours, x, eta, "latent")
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)
    pictures = (diffusers_own(ours, x, eta, "np") * 255).round()
    assert np.abs(ours.decode(latents) - pictures).max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_without_noise_the_same_seed_gives_diffusers_own_picture(policy, monkeypatch, name):
    ours = policy(name)
    still = type(ours.schedule).from_config(ours.pipeline.scheduler.config, STEPS, 0.0)
    monkeypatch.setattr(ours, "schedule", still)
    x = start(ours)
    latents = ours.denoise(x, PROMPTS[:2], 0, STEPS, noise_of(1, x.shape)).latents[:, -1]
    torch.testing.assert_close(latents, diffusers_own(ours, x, 0.0, "latent"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_pictures_of_another_size_are_diffusers_own(policy, name):
    ours = policy(name, sampling__height=32, sampling__width=48)
    assert (ours.picture_size, ours.latent_shape) == ((32, 48), (4, 16, 24))
    x = start(ours)
    latents = ours.denoise(x, PROMPTS[:2], 0, STEPS, noise_of(1, x.shape)).latents[:, -1]
    assert ours.decode(latents).shape == (2, 32, 48, 3)
    theirs = diffusers_own(ours, x, 1.0, "latent")
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)


def test_a_size_that_the_model_cannot_make_is_refused(policy):
    with pytest.raises(ConfigError, match=r"sampling\.width is 30: .* multiples of 8 .*use 32"):
        policy("sdxl", sampling__width=30)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_rescaled_guidance_is_diffusers_own(policy, name):
    ours = policy(name, sampling__guidance=7.0, sampling__guidance_rescale=0.7)
    x = start(ours)
    latents = ours.denoise(x, PROMPTS[:2], 0, STEPS, noise_of(1, x.shape)).latents[:, -1]
    theirs = diffusers_own(ours, x, 1.0, "latent", guidance_rescale=0.7)
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)
    plain = diffusers_own(ours, x, 1.0, "latent")
    assert (plain - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sd2_zero_snr", "sdxl"])
def test_the_ratio_is_one_before_any_update_in_every_precision(policy, name, dtype):
    ours = policy(name, model__dtype=dtype)
    x = start(ours)
    sampled = ours.denoise(x, PROMPTS[:2], 0, STEPS, noise_of(1, x.shape))
    assert sampled.latents.dtype == getattr(torch, dtype)
    for j in range(STEPS):
        i = torch.full((2,), j)
        again = ours.log_prob(i, sampled.latents[:, j], sampled.latents[:, j + 1], PROMPTS[:2])
        assert torch.equal(again, sampled.log_probs[:, j])
    assert np.ptp(ours.decode(sampled.latents[:, -1])) > 0


def test_a_decoder_that_overflows_in_half_precision_decodes_in_single(new_policy):
    ours = new_policy("sd1", model__dtype="float16", model__vae_dtype="float16")
    vae = ours.pipeline.vae
    x = start(ours).half()
    sound = ours.decode(x)
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 3e4  # group norm undoes it, unless it was infinite
        vae.decoder.conv_in.bias *= 3e4
    assert not ours._decode(x, torch.float16).isfinite().all()
    again = ours.decode(x)
    assert np.abs(again.astype(int) - sound).mean() < 30
    assert vae.dtype == torch.float16
    np.testing.assert_array_equal(ours.decode(x), again)


@pytest.mark.parametrize(
    ("dtype", "auto", "found"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("float16", True, torch.float32),
        ("float16", False, torch.float16),
    ],
)
def test_the_decoder_is_single_where_the_model_says_that_half_overflows(
    new_policy, folders, dtype, auto, found
):
    folder = folders("sd1")
    file = folder / "vae" / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "force_upcast": auto}))
    try:
        assert new_policy("sd1", model__dtype=dtype).pipeline.vae.dtype == found
    finally:
        file.write_text(before)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_reference_is_the_base_model(policy, name):
    ours = policy(name)
    first = ours.lora_state()
    i, x = torch.tensor([1, 3]), start(ours)
    with torch.no_grad():
        base = ours.predict(i, x, PROMPTS[:2])
        ours.bind({k: np.full_like(v, 0.1) for k, v in ours.lora_state().items()})
        moved = ours.predict(i, x, PROMPTS[:2])
        with ours.reference():
            reference = ours.predict(i, x, PROMPTS[:2])
        again = ours.predict(i, x, PROMPTS[:2])
    ours.bind(first)
    assert torch.equal(reference, base)
    assert (moved - base).abs().max() > 1e-3
    assert torch.equal(again, moved)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_options_that_save_memory_change_no_gradient(policy, name):
    def gradient(**over: object) -> torch.Tensor:
        ours = policy(name, **over)
        x = start(ours)
        i = torch.tensor([1, 3])
        ours.log_prob(i, x, x * 0.9, PROMPTS[:2]).sum().backward()
        return gradient_of(ours)

    plain = gradient()
    saving = gradient(model__gradient_checkpointing=True, model__offload=True)
    assert plain.abs().max() > 0
    torch.testing.assert_close(saving, plain)
    ordered = gradient(model__channels_last=True)
    torch.testing.assert_close(ordered, plain, rtol=1e-3, atol=1e-5)


def gradient_of(policy: Policy) -> torch.Tensor:
    """The gradient that was computed, as one vector; it is cleared."""
    learning = [p for p in policy.pipeline.unet.parameters() if p.grad is not None]
    gradient = torch.cat([p.grad.flatten() for p in learning])
    for parameter in learning:
        parameter.grad = None
    return gradient


def test_slices_and_tiles_decode_to_the_same_pictures(policy):
    plain = policy("sd1")
    x = start(plain, 3)
    sliced = policy("sd1", model__vae_slicing=True, model__vae_tiling=True)
    assert sliced.pipeline.vae.use_slicing and sliced.pipeline.vae.use_tiling
    assert np.abs(sliced.decode(x).astype(int) - plain.decode(x)).max() <= 1


def test_a_learner_leaves_the_decoder_where_it_is(models, folders):
    learner = Policy(config(models, model__path=folders("sd1")), torch.device("meta"), False)
    assert learner.pipeline.vae.device == CPU
    assert learner.pipeline.unet.device == torch.device("meta")


def test_a_pipeline_of_another_family_is_named(models, folders, tmp_path):
    pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ConfigError, match=r"is a FluxPipeline: StableDiffusionPipeline and"):
        Policy(config(models, model__path=tmp_path), CPU)


def test_an_inpainting_model_is_refused(models, tmp_path):
    pipe = pipeline()
    pipe.register_modules(unet=UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"takes 9 channels, its VAE makes 4: inpainting"):
        Policy(config(models, model__path=tmp_path), CPU)


def test_a_variant_that_is_not_there_is_named(policy):
    with pytest.raises(ConfigError, match=r"cannot be loaded as .* variant 'fp16'"):
        policy("sd1", model__variant="fp16")


def test_a_variant_is_what_is_loaded(models, folders, tmp_path):
    pipeline(seed=0).save_pretrained(tmp_path)
    other = pipeline(seed=1)
    other.save_pretrained(tmp_path, variant="fp16")
    loaded = Policy(config(models, model__path=tmp_path, model__variant="fp16"), CPU)
    torch.testing.assert_close(
        loaded.pipeline.unet.conv_in.weight, other.unet.conv_in.weight, rtol=0, atol=0
    )


def test_zero_signal_with_epsilon_prediction_is_refused(models, tmp_path):
    pipeline(**{**ZERO_SNR, "prediction_type": "epsilon"}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"rescale_betas_zero_snr=True with epsilon"):
        Policy(config(models, model__path=tmp_path), CPU)


def test_schedulers_of_other_classes_give_the_same_table(policy):
    ours = policy("sdxl")  # XL comes with EulerDiscreteScheduler
    ddim = DDIMScheduler(**SCHEDULER, timestep_spacing="leading", clip_sample=False)
    ddim.set_timesteps(STEPS)
    assert ours.schedule.timesteps.tolist() == ddim.timesteps.tolist()


@pytest.mark.timeout(900)  # compiling takes minutes on a busy machine
def test_a_compiled_model_predicts_and_learns_the_same(policy):
    plain, compiled = policy("sd1"), policy("sd1", model__compile=True)
    i, x = torch.tensor([1, 3]), start(plain)
    gradients = []
    for ours in (plain, compiled):
        ours.log_prob(i, x, x * 0.9, PROMPTS[:2]).sum().backward()
        gradients.append(gradient_of(ours))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert compiled.lora_state().keys() == plain.lora_state().keys()
    with torch.no_grad(), compiled.reference():
        base = compiled.predict(i, x, PROMPTS[:2])
    torch.testing.assert_close(base, plain.predict(i, x, PROMPTS[:2]), rtol=1e-3, atol=1e-4)
