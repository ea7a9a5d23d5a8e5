"""Training data of the reward stages: captions, similar wrong captions, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from b2ray.shapes.captions import Caption, near_misses
from b2ray.shapes.render import draw, place, render
from tools.shapes.common import draw_captions, to_pixels, to_tensor


@dataclass(frozen=True, slots=True)
class CaptionFamily:
    """A caption and a near miss of it, each with similar wrong captions.

    Attributes:
        captions: the caption and the near miss.
        wrong: the near misses of each of the two captions.
    """

    captions: tuple[Caption, Caption]
    wrong: tuple[list[Caption], list[Caption]]


def draw_families(count: int, rng: np.random.Generator) -> list[CaptionFamily]:
    """Draw captions uniformly, each with one of its near misses."""
    families = []
    for caption in draw_captions(count, rng):
        wrong = near_misses(caption, rng)
        twin = wrong[rng.integers(len(wrong))]
        families.append(CaptionFamily((caption, twin), (wrong, near_misses(twin, rng))))
    return families


@torch.no_grad()
def draw_pictures(
    families: list[CaptionFamily], vae: AutoencoderKL, rng: np.random.Generator
) -> np.ndarray:
    """Draw a picture of each family's caption, one of its near miss, and a broken one.

    Half of the good pictures and all broken ones pass through the autoencoder with noisy latents,
    because a denoiser's samples come from the decoder, too. A broken picture lacks an object or is
    a mixture of the two others.

    Args:
        families: the captions.
        vae: the autoencoder.
        rng: the generator.

    Returns:
        uint8 ``(families, 3, 32, 32, 3)``, in the order above.
    """
    pictures = np.empty((len(families), 3, 32, 32, 3), np.uint8)
    for i, family in enumerate(families):
        seed = [int(s) for s in rng.integers(2**31, size=2)]
        for side in (0, 1):
            # Two thirds have the same seed, so that they differ in the wrong attribute alone.
            pictures[i, side] = render(family.captions[side], seed[side if i % 3 == 0 else 0])
        objects = place(family.captions[0], rng)
        pictures[i, 2] = draw([objects[rng.integers(2)]], rng)
    for start in tqdm(range(0, len(families), 128), desc="pictures", mininterval=2):
        _decode(pictures[start : start + 128], vae, rng)
    return pictures


def _decode(pictures: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator) -> None:
    """Pass pictures through the autoencoder, in place; see `draw_pictures`."""
    count = len(pictures)
    latents = vae.encode(to_tensor(pictures.reshape(-1, 32, 32, 3))).latent_dist.mean
    latents = latents.view(count, 3, *latents.shape[1:])
    weight = torch.from_numpy(rng.uniform(0.3, 0.7, count)).float().view(-1, 1, 1, 1)
    mixture = latents[:, 0] * (1 - weight) + latents[:, 1] * weight
    mixed = torch.from_numpy(rng.random(count) < 0.6).view(-1, 1, 1, 1)
    latents[:, 2] = torch.where(mixed, mixture, latents[:, 2])
    noise = torch.rand(count, 3, 1, 1, 1) ** 2 * 0.3 / vae.config.scaling_factor
    latents = latents + noise * torch.randn_like(latents)
    decoded = to_pixels(vae.decode(latents.flatten(0, 1)).sample).reshape(pictures.shape)
    unchanged = rng.random((count, 3)) < 0.5
    unchanged[:, 2] = False
    pictures[~unchanged] = decoded[~unchanged]
