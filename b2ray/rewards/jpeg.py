"""JPEG compressibility, the size of a picture's JPEG file (arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from b2ray.config import Reward, Section
from b2ray.rewards.options import JpegOptions


class Incompressibility:
    """The size of a picture's JPEG file in kB (1 000 bytes).

    Args:
        spec: the reward's specification.
        options: a `JpegOptions`.
        device: not used.
    """

    sign = 1.0

    def __init__(self, spec: Reward, options: Section, device: torch.device) -> None:
        assert isinstance(options, JpegOptions)
        self.quality = options.quality

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Sizes times `sign`; arguments as in `b2ray.rewards.RewardModel`, prompts are not used."""
        return np.array([self.sign * self._kilobytes(image) for image in images], np.float32)

    def _kilobytes(self, image: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class Compressibility(Incompressibility):
    """Minus the size of a picture's JPEG file in kB."""

    sign = -1.0
