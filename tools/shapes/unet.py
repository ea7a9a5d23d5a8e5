"""Stage ``unet`` trains the denoiser and writes the complete base pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer

from b2ray.shapes.captions import all_captions
from b2ray.shapes.render import render_batch
from tools.shapes.common import (
    Settings,
    begin,
    draw_captions,
    replacing,
    to_tensor,
    train,
)
from tools.shapes.facts import record

STEPS, BATCH, RATE, PICTURES = 3_000, 64, 2e-3, 24_000
DROPOUT = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
DECAY = 0.998  # of the moving average of the weights
SHAPE: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,  # in SD 1.x this setting holds the number of heads
    "norm_num_groups": 8,
}
"""The fastest of the shapes in stage ``benchmark`` that draws well enough."""


def make_unet(**shape: Any) -> UNet2DConditionModel:
    """Make a denoiser for 8 × 8 latents with 4 channels and text states of width 64.

    Args:
        shape: arguments of diffusers' `UNet2DConditionModel`; `SHAPE` if there are none.
    """
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=64, **(shape or SHAPE)
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )


def build(settings: Settings) -> None:
    """Train the denoiser and save the pipeline in ``base``."""
    # The data, and the frozen parts of the pipeline.
    start = time.perf_counter()
    rng = begin(settings, 4)
    vae = AutoencoderKL.from_pretrained(settings.base / "vae").eval()
    encoder = CLIPTextModel.from_pretrained(settings.base / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(settings.base / "tokenizer")
    scheduler = make_scheduler()
    latents, captions = _latents(vae, settings, rng)
    texts = _texts(encoder, tokenizer)
    # Training with a moving average of the weights, which is what is saved.
    unet = make_unet().to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    average = EMAModel(unet.parameters(), decay=DECAY, use_ema_warmup=True, power=0.75)
    steps = settings.count(STEPS)
    loss = train(
        "unet",
        list(unet.parameters()),
        steps,
        RATE,
        _loss(unet, scheduler, latents, captions, texts, rng),
        lambda step: average.step(unet.parameters()),
    )
    average.copy_to(unet.parameters())
    unet.to(memory_format=torch.contiguous_format).eval()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with replacing(settings.base) as folder:
        pipeline.save_pretrained(folder)
    record(
        settings,
        "unet",
        {
            "steps": steps,
            "loss": loss,
            "parameters": sum(p.numel() for p in unet.parameters()),
            "minutes": (time.perf_counter() - start) / 60,
        },
    )


def _loss(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    captions: np.ndarray,
    texts: torch.Tensor,
    rng: np.random.Generator,
) -> Callable[[int], torch.Tensor]:
    """The mean square error of the predicted noise, as a function of the step.

    Args:
        unet: the denoiser.
        scheduler: the noise schedule.
        latents: float32 ``(N, 4, 8, 8)``, scaled.
        captions: int64 ``(N,)``, rows of ``texts``.
        texts: float32 ``(1 + captions of the world, tokens, width)``; row 0 is the empty prompt.
        rng: the generator that chooses latents.
    """

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.integers(len(latents), size=BATCH)
        rows = np.where(rng.random(BATCH) < DROPOUT, 0, captions[picked])
        noise = torch.randn(BATCH, *latents.shape[1:])
        times = torch.randint(len(scheduler.alphas_cumprod), (BATCH,))
        noisy = scheduler.add_noise(latents[picked], noise, times)
        loss: torch.Tensor = (unet(noisy, times, texts[rows]).sample - noise).square().mean()
        return loss

    return loss_of


@torch.no_grad()
def _latents(
    vae: AutoencoderKL, settings: Settings, rng: np.random.Generator
) -> tuple[torch.Tensor, np.ndarray]:
    """Scaled latents of rendered pictures, ``(N, 4, 8, 8)``, and the rows of `_texts` for them."""
    captions = draw_captions(settings.count(PICTURES, BATCH), rng)
    rows = {caption: i + 1 for i, caption in enumerate(all_captions())}
    pictures = render_batch(captions, settings.seed + 4)
    parts = [
        vae.encode(to_tensor(pictures[i : i + 256])).latent_dist.mean
        for i in range(0, len(pictures), 256)
    ]
    return torch.cat(parts) * vae.config.scaling_factor, np.array([rows[c] for c in captions])


@torch.no_grad()
def _texts(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Hidden states of the empty prompt and of all captions, as the pipeline computes them."""
    prompts = ["", *(caption.text for caption in all_captions())]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    states: torch.Tensor = encoder(tokens.input_ids)[0]
    return states
