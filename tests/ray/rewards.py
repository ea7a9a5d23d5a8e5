"""Rewards that misbehave, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class NotANumber:
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        scores = np.linspace(0, 1, len(prompts), dtype=np.float32)
        scores[0] = np.nan
        return scores


class Constant:
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.full(len(prompts), 0.5, np.float32)


class Brightness:
    """A sound reward without a model."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return images.reshape(len(images), -1).mean(axis=1).astype(np.float32)


def brightness(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The same as a function."""
    return Brightness().score(images, prompts)
