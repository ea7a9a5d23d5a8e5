"""Pictures made worse, by a known strength from 0 (untouched) to 1."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

from b2ray.shapes.build.common import to_pixels, to_tensor

CHUNK = 128


def degrade(
    images: np.ndarray, strength: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator
) -> np.ndarray:
    """Each picture made worse in one way, drawn evenly.

    Args:
        images: uint8 ``(N, 32, 32, 3)``.
        strength: float ``(N,)`` from 0 to 1.

    Returns:
        uint8 ``(N, 32, 32, 3)``.
    """
    out = images.copy()
    way = rng.integers(len(_WAYS) + 1, size=len(images))
    for i in np.flatnonzero(way < len(_WAYS)):
        out[i] = _WAYS[way[i]](images[i], float(strength[i]), rng)
    noisy = np.flatnonzero(way == len(_WAYS))
    out[noisy] = through(vae, images[noisy], strength[noisy])
    return out


@torch.no_grad()
def through(vae: AutoencoderKL, images: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Pictures that went through the autoencoder, with normal noise of a standard deviation on
    their scaled latents: what an unfinished denoising looks like."""
    out = images.copy()
    for low in range(0, len(images), CHUNK):
        latents = vae.encode(to_tensor(images[low : low + CHUNK])).latent_dist.mean
        spread = torch.from_numpy(noise[low : low + CHUNK]).float() / vae.config.scaling_factor
        latents = latents + spread.view(-1, 1, 1, 1) * torch.randn_like(latents)
        out[low : low + CHUNK] = to_pixels(vae.decode(latents).sample)
    return out


def _blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.5 * strength)))


def _noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _levels(image + 60 * strength * rng.standard_normal(image.shape))


def _cast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A colour that lies over the whole picture, which is no longer nearly white then."""
    colour = rng.uniform(0, 160, 3)
    return _levels(image + 0.7 * strength * (colour - image))


def _blocks(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG's artefacts, of qualities 60 to 2."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=round(60 - 58 * strength))
    worse = np.asarray(Image.open(buffer), np.float64)
    # The lightest strengths lie between the picture and its best JPEG.
    return _levels(image + min(1.0, 4 * strength) * (worse - image))


def _cut(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Part of what is drawn, on one side of a line, takes the background's colour."""
    ground = np.median(image.reshape(-1, 3), axis=0)
    y, x = np.nonzero(np.abs(image - ground).sum(2) > 60)
    if not len(y):
        return image
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    gone = along >= np.quantile(along, 1 - 0.6 * strength) if strength > 0 else along > np.inf
    out = image.copy()
    out[y[gone], x[gone]] = ground
    return out


def _levels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


_WAYS: tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], ...] = (
    _blur,
    _noise,
    _cast,
    _blocks,
    _cut,
)
