"""Captions with what they must be told from, and pictures of both: data of the reward stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from b2ray.shapes.build.common import draw_captions, to_pixels, to_tensor
from b2ray.shapes.captions import Caption, near_misses
from b2ray.shapes.render import draw, place, render


@dataclass(frozen=True, slots=True)
class Family:
    """A caption and a near miss of it, each with the captions it must be told from."""

    captions: tuple[Caption, Caption]
    wrong: tuple[list[Caption], list[Caption]]


def draw_families(count: int, rng: np.random.Generator) -> list[Family]:
    """Captions drawn evenly, each with a near miss of it."""
    out = []
    for caption in draw_captions(count, rng):
        wrong = near_misses(caption, rng)
        twin = wrong[rng.integers(len(wrong))]
        out.append(Family((caption, twin), (wrong, near_misses(twin, rng))))
    return out


@torch.no_grad()
def draw_pictures(
    families: list[Family], vae: AutoencoderKL, rng: np.random.Generator
) -> np.ndarray:
    """uint8 ``(families, 3, 32, 32, 3)``: of the caption, of its near miss, broken.

    Half of the good pictures and all of the broken ones come out of the autoencoder's decoder,
    some from noisy latents, as a denoiser's results do. A broken picture lacks an object, or
    lies halfway between the two others.
    """
    out = np.empty((len(families), 3, 32, 32, 3), np.uint8)
    for i, family in enumerate(families):
        seed = [int(s) for s in rng.integers(2**31, size=2)]
        for side in (0, 1):
            # Often the same seed: same places and sizes, so that only the attribute differs.
            out[i, side] = render(family.captions[side], seed[side if i % 3 == 0 else 0])
        lone = place(family.captions[0], rng)
        out[i, 2] = draw([lone[rng.integers(2)]], rng)
    for start in tqdm(range(0, len(families), 128), desc="pictures", mininterval=2):
        part = out[start : start + 128]
        _decode(part, vae, rng)
    return out


def _decode(part: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator) -> None:
    """Passes pictures through the autoencoder, in place; see `draw_pictures`."""
    count = len(part)
    latents = vae.encode(to_tensor(part.reshape(-1, 32, 32, 3))).latent_dist.mean
    latents = latents.view(count, 3, *latents.shape[1:])
    weight = torch.from_numpy(rng.uniform(0.3, 0.7, count)).float().view(-1, 1, 1, 1)
    between = latents[:, 0] * (1 - weight) + latents[:, 1] * weight
    blend = torch.from_numpy(rng.random(count) < 0.6).view(-1, 1, 1, 1)
    latents[:, 2] = torch.where(blend, between, latents[:, 2])
    noise = torch.rand(count, 3, 1, 1, 1) ** 2 * 0.3 / vae.config.scaling_factor
    latents = latents + noise * torch.randn_like(latents)
    decoded = to_pixels(vae.decode(latents.flatten(0, 1)).sample).reshape(part.shape)
    keep = rng.random((count, 3)) < 0.5
    keep[:, 2] = False
    part[~keep] = decoded[~keep]
