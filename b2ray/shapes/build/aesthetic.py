"""Stage ``aesthetic``: how clean a picture is, whatever it shows, from 1 to 10.

A small CLIP image tower and a linear head in the files of LAION's aesthetic predictor, trained as
that one is: the squared error against ratings. A rating here is 10 for a clean picture and one
less for every ninth of a degradation's full strength.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from b2ray.rewards import head
from b2ray.shapes.build.common import Settings, begin, draw_captions, replacing, to_tensor, train
from b2ray.shapes.build.contrast import PATCH, image_processor, normalise
from b2ray.shapes.build.degrade import degrade, through
from b2ray.shapes.build.evaluate import area_under_curve
from b2ray.shapes.build.facts import record
from b2ray.shapes.render import render_batch

STEPS, BATCH, RATE, PICTURES, MEASURED = 1_500, 64, 1e-3, 16_000, 2_000
WIDTH, HEADS, LAYERS, HEAD_WIDTHS = 64, 4, 3, (64, 64, 32, 16, 8, 1)
BEST, RANGE = 10.0, 9.0
CLEAN = 0.25  # share of pictures that are left as they are
VISIBLE = 0.25  # strength from which a degraded picture counts as such in the figures


def build(settings: Settings) -> None:
    """Trains tower and head and saves both in ``aesthetic``."""
    started = time.perf_counter()
    rng = begin(settings, 7)
    vae = AutoencoderKL.from_pretrained(settings.base / "vae").eval()
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            projection_dim=WIDTH,
            image_size=32,
            patch_size=PATCH,
        )
    )
    layers = _head()
    pictures, strength = _pictures(settings.count(PICTURES, BATCH), settings.seed + 7, vae, rng)
    ratings = torch.from_numpy(BEST - RANGE * strength).float()

    def rate(images: np.ndarray) -> torch.Tensor:
        features = model(pixel_values=normalise(to_tensor(images))).image_embeds
        return layers(torch.nn.functional.normalize(features, dim=1)).squeeze(1)

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.integers(len(pictures), size=BATCH)
        return (rate(pictures[picked]) - ratings[picked]).square().mean()

    steps = settings.count(STEPS)
    parameters = [*model.parameters(), *layers.parameters()]
    loss = train("aesthetic", parameters, steps, RATE, loss_of)
    model.eval()
    with replacing(settings.aesthetic) as folder:
        model.config.save_pretrained(folder)
        image_processor().save_pretrained(folder)
        tensors = {**model.state_dict(), **layers.state_dict(prefix="layers.")}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    figures = _figures(rate, settings, vae, rng)
    record(
        settings,
        "aesthetic",
        {
            "steps": steps,
            "loss": loss,
            "parameters": sum(p.numel() for p in parameters),
            "minutes": (time.perf_counter() - started) / 60,
            **figures,
        },
    )


def _head() -> torch.nn.Sequential:
    """Five layers that pass a unit vector on at its length, and start at the middling rating."""
    layers = head.make(HEAD_WIDTHS)
    linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
    for layer in linear:
        torch.nn.init.orthogonal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.constant_(linear[-1].bias, BEST - RANGE / 2)
    return layers.eval()  # without dropout, which is meant for the real head's 1 024 numbers


def _pictures(
    count: int, seed: int, vae: AutoencoderKL, rng: np.random.Generator, least: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 ``(count, 32, 32, 3)`` and how strongly each is degraded, 0 to 1.

    Half of them go through the autoencoder first, as everything does that the base model draws.
    """
    drawn = render_batch(draw_captions(count, rng), seed)
    strength = np.where(rng.random(count) < CLEAN, 0, rng.uniform(least, 1, count))
    out = []
    for low in tqdm(range(0, count, 1_000), desc="pictures", mininterval=2):
        images = drawn[low : low + 1_000]
        decoded = np.flatnonzero(rng.random(len(images)) < 0.5)
        images[decoded] = through(vae, images[decoded], np.zeros(len(decoded)))
        out.append(degrade(images, strength[low : low + 1_000], vae, rng))
    return np.concatenate(out), strength


@torch.no_grad()
def _figures(
    rate: Callable[[np.ndarray], torch.Tensor],
    settings: Settings,
    vae: AutoencoderKL,
    rng: np.random.Generator,
) -> dict[str, float]:
    """On fresh pictures, the degraded ones at least visibly so."""
    count = settings.count(MEASURED, 64)
    images, strength = _pictures(count, settings.seed + 71, vae, rng, VISIBLE)
    ratings = torch.cat([rate(images[i : i + 256]) for i in range(0, count, 256)]).numpy()
    clean = strength == 0
    return {
        "auc_clean_degraded": area_under_curve(ratings, clean),
        "correlation": float(np.corrcoef(ratings, BEST - RANGE * strength)[0, 1]),
        "mean_clean": float(ratings[clean].mean()),
        "mean_degraded": float(ratings[~clean].mean()),
    }
