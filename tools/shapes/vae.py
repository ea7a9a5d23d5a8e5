"""Stage ``vae`` trains the autoencoder: 32 × 32 pictures ↔ 8 × 8 latents of 4 channels."""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import AutoencoderKL

from b2ray.shapes.judge import Judge
from b2ray.shapes.render import render_batch
from tools.shapes.common import (
    Settings,
    begin,
    draw_captions,
    replacing,
    to_pixels,
    to_tensor,
    train,
)
from tools.shapes.facts import record

STEPS, BATCH, RATE, PICTURES, KL = 1_000, 32, 2e-3, 10_000, 1e-4


def build(settings: Settings) -> None:
    """Train the autoencoder and save ``base/vae`` with the measured scaling factor."""
    start = time.perf_counter()
    rng = begin(settings, 1)
    captions = draw_captions(settings.count(PICTURES, 64), rng)
    pictures = render_batch(captions, settings.seed + 1)
    vae = AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)  # a tenth faster on a CPU

    def loss_of(step: int) -> torch.Tensor:
        x = to_tensor(pictures[rng.integers(len(pictures), size=BATCH)])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        kl: torch.Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + KL * kl

    steps = settings.count(STEPS)
    train("vae", list(vae.parameters()), steps, RATE, loss_of)
    vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        sample = to_tensor(pictures[:512])
        std = vae.encode(sample).latent_dist.sample().std()
    vae.register_to_config(scaling_factor=round(float(1 / std), 5))
    with replacing(settings.base / "vae") as folder:
        vae.save_pretrained(folder)
    record(settings, "vae", {"steps": steps, **_measure(vae, settings), **_cost(vae, start)})


def _measure(vae: AutoencoderKL, settings: Settings) -> dict[str, float]:
    """Measure the reconstruction of new pictures: its error in levels, and the judge's score."""
    rng = np.random.default_rng((settings.seed, 101))
    captions = draw_captions(settings.count(512, 8), rng)
    pictures = render_batch(captions, settings.seed + 101)
    with torch.no_grad():
        reconstructed = to_pixels(vae(to_tensor(pictures)).sample)
    error = np.abs(reconstructed.astype(float) - pictures).mean()
    judged = Judge().score(reconstructed, [caption.text for caption in captions]).mean()
    return {"mean_error_levels": float(error), "judged_right": float(judged)}


def _cost(vae: AutoencoderKL, start: float) -> dict[str, float]:
    """Number of parameters, and minutes since the start."""
    parameters = sum(p.numel() for p in vae.parameters())
    return {"parameters": parameters, "minutes": (time.perf_counter() - start) / 60}
