"""Degradation of pictures by a known strength from 0 (unchanged) to 1."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

from tools.shapes.common import to_pixels, to_tensor

CHUNK = 128


def degrade(
    images: np.ndarray, strength: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator
) -> np.ndarray:
    """Degrade each picture in one of several ways, which is drawn uniformly.

    Args:
        images: uint8 ``(N, 32, 32, 3)``.
        strength: strength for each picture, float ``(N,)`` from 0 to 1.
        vae: the autoencoder, because one way is to add noise to the latents.
        rng: the generator of the ways and of the degradations.

    Returns:
        uint8 ``(N, 32, 32, 3)``.
    """
    degraded = images.copy()
    way = rng.integers(len(_WAYS) + 1, size=len(images))
    for i in np.flatnonzero(way < len(_WAYS)):
        degraded[i] = _WAYS[way[i]](images[i], float(strength[i]), rng)
    noisy = np.flatnonzero(way == len(_WAYS))
    degraded[noisy] = through(vae, images[noisy], strength[noisy])
    return degraded


@torch.no_grad()
def through(vae: AutoencoderKL, images: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Encode and decode pictures with noisy latents, as if denoising had stopped too early.

    Args:
        vae: the autoencoder.
        images: uint8 ``(N, 32, 32, 3)``.
        noise: standard deviation of the normal noise on each picture's scaled latents, ``(N,)``.

    Returns:
        uint8 ``(N, 32, 32, 3)``.
    """
    decoded = images.copy()
    for low in range(0, len(images), CHUNK):
        latents = vae.encode(to_tensor(images[low : low + CHUNK])).latent_dist.mean
        std = torch.from_numpy(noise[low : low + CHUNK]).float() / vae.config.scaling_factor
        latents = latents + std.view(-1, 1, 1, 1) * torch.randn_like(latents)
        decoded[low : low + CHUNK] = to_pixels(vae.decode(latents).sample)
    return decoded


def _blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of at most 2.5 pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.5 * strength)))


def _noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Normal noise of at most 60 levels."""
    return _levels(image + 60 * strength * rng.standard_normal(image.shape))


def _cast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A colour over the whole picture, whose background is then no longer nearly white."""
    colour = rng.uniform(0, 160, 3)
    return _levels(image + 0.7 * strength * (colour - image))


def _blocks(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The artefacts of JPEG with qualities from 60 to 2."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=round(60 - 58 * strength))
    compressed = np.asarray(Image.open(buffer), np.float64)
    # The lowest strengths interpolate between the picture and its JPEG.
    return _levels(image + min(1.0, 4 * strength) * (compressed - image))


def _cut(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Fill the part of the objects on one side of a line with the colour of the background."""
    background = np.median(image.reshape(-1, 3), axis=0)
    y, x = np.nonzero(np.abs(image - background).sum(2) > 60)
    if not len(y):
        return image
    angle = rng.uniform(0, 2 * np.pi)
    position = x * np.cos(angle) + y * np.sin(angle)
    limit = np.quantile(position, 1 - 0.6 * strength) if strength > 0 else np.inf
    removed = position >= limit
    cut = image.copy()
    cut[y[removed], x[removed]] = background
    return cut


def _levels(values: np.ndarray) -> np.ndarray:
    """Values as uint8 levels from 0 to 255."""
    return values.round().clip(0, 255).astype(np.uint8)


_WAYS: tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], ...] = (
    _blur,
    _noise,
    _cast,
    _blocks,
    _cut,
)
