"""Stage ``aesthetic`` trains a reward for how clean a picture is, whatever it shows.

The reward is a small CLIP image tower with a linear head, in the files of LAION's aesthetic
predictor, and it minimises the squared error of ratings as that one does. Here the rating is 10 for
a clean picture and falls linearly to 1 at the full strength of a degradation.
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
from b2ray.shapes.render import render_batch
from tools.shapes.common import Settings, begin, draw_captions, replacing, to_tensor, train
from tools.shapes.contrast import PATCH, image_processor, normalise
from tools.shapes.degrade import degrade, through
from tools.shapes.evaluate import area_under_curve
from tools.shapes.facts import record

STEPS, BATCH, RATE, PICTURES, MEASURED = 1_500, 64, 1e-3, 16_000, 2_000
WIDTH, HEADS, LAYERS, HEAD_WIDTHS = 64, 4, 3, (64, 64, 32, 16, 8, 1)
BEST, RANGE = 10.0, 9.0
CLEAN = 0.25  # share of pictures that are not degraded
VISIBLE = 0.25  # least strength of the degraded pictures in the figures


def build(settings: Settings) -> None:
    """Train the tower and the head and save both in ``aesthetic``."""
    # The model and its data.
    start = time.perf_counter()
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

    # Training, weights and figures.
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
            "minutes": (time.perf_counter() - start) / 60,
            **figures,
        },
    )


def _head() -> torch.nn.Sequential:
    """Five layers that preserve the length of a vector, and start at the average rating."""
    layers = head.make(HEAD_WIDTHS)
    linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
    for layer in linear:
        torch.nn.init.orthogonal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.constant_(linear[-1].bias, BEST - RANGE / 2)
    return layers.eval()  # without dropout, which suits the width of 1 024 of the real head


def _pictures(
    count: int, seed: int, vae: AutoencoderKL, rng: np.random.Generator, least: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Render pictures and degrade most of them.

    Half of the pictures pass through the autoencoder first, as all samples of the base model do.

    Args:
        count: number of pictures.
        seed: seed of the rendered pictures.
        vae: the autoencoder.
        rng: the generator of everything else.
        least: least strength of a degradation.

    Returns:
        The pictures, uint8 ``(count, 32, 32, 3)``, and the strength of each one's degradation,
        float64 ``(count,)`` from 0 to 1.
    """
    rendered = render_batch(draw_captions(count, rng), seed)
    strength = np.where(rng.random(count) < CLEAN, 0, rng.uniform(least, 1, count))
    parts = []
    for low in tqdm(range(0, count, 1_000), desc="pictures", mininterval=2):
        images = rendered[low : low + 1_000]
        decoded = np.flatnonzero(rng.random(len(images)) < 0.5)
        images[decoded] = through(vae, images[decoded], np.zeros(len(decoded)))
        parts.append(degrade(images, strength[low : low + 1_000], vae, rng))
    return np.concatenate(parts), strength


@torch.no_grad()
def _figures(
    rate: Callable[[np.ndarray], torch.Tensor],
    settings: Settings,
    vae: AutoencoderKL,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Measure the ratings of new pictures, of which the degraded ones are visibly degraded."""
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
