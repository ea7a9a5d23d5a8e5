"""Pictures to model inputs on the device, equal to Pillow's resizing within one 8-bit level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate


def to_pixels(
    images: np.ndarray, size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """Resize the shortest side to `size`, crop the centre, normalise.

    Args:
        images: uint8, shape (N, height, width, 3).
        size: side of the model's square input in pixels.
        mean, std: of each colour channel, for values in 0..1.
        device: where the result is.

    Returns:
        float32, shape (N, 3, size, size).
    """
    levels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
    pixels = _crop(_resize(levels, size), size) / 255

    def column(v: Sequence[float]) -> torch.Tensor:
        return torch.tensor(v, device=device)[:, None, None]

    return (pixels - column(mean)) / column(std)


def _resize(levels: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic with antialiasing in two passes, rounded to whole levels after each, as Pillow."""
    height, width = levels.shape[-2:]
    if min(height, width) == size:
        return levels
    new_height, new_width = (
        size * height // min(height, width),
        size * width // min(height, width),
    )
    for shape in ((height, new_width), (new_height, new_width)):
        levels = interpolate(levels, shape, mode="bicubic", antialias=True)
        levels = levels.round().clamp(0, 255)
    return levels


def _crop(levels: torch.Tensor, size: int) -> torch.Tensor:
    top, left = (levels.shape[-2] - size) // 2, (levels.shape[-1] - size) // 2
    return levels[..., top : top + size, left : left + size]
