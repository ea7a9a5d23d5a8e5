"""The image tower of a CLIP, which maps pictures to unit vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from b2ray.rewards.preprocess import to_pixels


class Tower(ABC):
    """The common part of rewards that embed pictures with a CLIP; subclasses set the attributes."""

    device: torch.device
    """The device of the model."""
    size: int
    """Side of the model's square input in pixels."""
    mean: Sequence[float]
    """Mean of each colour channel, for values from 0 to 1."""
    std: Sequence[float]
    """Standard deviation of each colour channel."""

    @abstractmethod
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected embeddings (N, D), not normalised, of pixels (N, 3, size, size)."""

    @torch.inference_mode()
    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embed pictures.

        Args:
            images: uint8, shape (N, height, width, 3).

        Returns:
            Unit vectors, float32, shape (N, D).
        """
        pixels = to_pixels(images, self.size, self.mean, self.std, self.device)
        return torch.nn.functional.normalize(self._features(pixels), dim=1).cpu().numpy()
