"""An image tower: pictures to unit vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from b2ray.rewards.preprocess import to_pixels


class Tower(ABC):
    """What the rewards share that see a picture through a CLIP; they set these attributes."""

    device: torch.device
    size: int
    """Side of the model's square input in pixels."""
    mean: Sequence[float]
    std: Sequence[float]

    @abstractmethod
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected embeddings (N, D), not normalised, of model inputs (N, 3, size, size)."""

    @torch.inference_mode()
    def embed(self, images: np.ndarray) -> np.ndarray:
        """Unit image embeddings, float32, shape (N, D)."""
        pixels = to_pixels(images, self.size, self.mean, self.std, self.device)
        return torch.nn.functional.normalize(self._features(pixels), dim=1).cpu().numpy()
