"""Preprocessing of pictures on the device, within one 8-bit level of Pillow's resizing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_pixels(
    images: np.ndarray, size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """Resize pictures so that the shortest side is `size`, crop the centre, and normalise.

    Args:
        images: uint8, shape (N, height, width, 3).
        size: side of the model's square input in pixels.
        mean, std: mean and standard deviation of each colour channel, for values from 0 to 1.
        device: the device of the result.

    Returns:
        float32, shape (N, 3, size, size).
    """
    levels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).double()
    pixels = _crop(_resize(levels, size), size).float() / 255

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None, None]

    return (pixels - column(mean)) / column(std)


def _resize(levels: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic resizing with antialiasing, with exactly Pillow's results.

    Like Pillow, it resizes columns and then rows, and rounds after each. Pillow's weights are whole
    multiples of 2^-22, for which sums of 8-bit levels are exact in float64.
    """
    height, width = levels.shape[-2:]
    short = min(height, width)
    if short == size:
        return levels
    across = _weights(width, size * width // short, levels.device)
    down = _weights(height, size * height // short, levels.device)
    for weigh in (lambda x: x @ across.T, lambda x: down @ x):
        levels = ((weigh(levels) + 2**21) / 2**22).floor().clamp(0, 255)
    return levels.float()


def _weights(old: int, new: int, device: torch.device) -> torch.Tensor:
    """Pillow's bicubic coefficients in multiples of 2^-22, float64, shape (new, old)."""
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    x = torch.arange(old, dtype=torch.float64)
    near = (x >= (centre - 2 * stretch + 0.5).floor()) & (x < (centre + 2 * stretch + 0.5).floor())
    d = ((x + 0.5 - centre) / stretch).abs()
    inner, outer = (1.5 * d - 2.5) * d * d + 1, -0.5 * (((d - 5) * d + 8) * d - 4)
    weights = torch.where(d < 1, inner, outer) * ((d < 2) & near)
    scaled = weights / weights.sum(1, keepdim=True) * 2**22
    return torch.where(scaled < 0, (scaled - 0.5).ceil(), (scaled + 0.5).floor()).to(device)


def _crop(levels: torch.Tensor, size: int) -> torch.Tensor:
    top, left = (levels.shape[-2] - size) // 2, (levels.shape[-1] - size) // 2
    return levels[..., top : top + size, left : left + size]
