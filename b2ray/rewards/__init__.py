"""Rewards: one protocol, one registry, one file each.

A reward is a class with `score(images, prompts)`, images uint8 of shape (N, height, width, 3),
returning N float32 scores; the same input gives the same scores. It may have `embed(images)`, which
returns unit vectors of shape (N, D) for the diversity figures. Built-in rewards are made with
`(spec, device)`; your own class, named as `module:Class`, is made without arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from b2ray.config import Reward
from b2ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

BUILT_IN = {"clip": "b2ray.rewards.clip:Clip"}


class Scorer(Protocol):
    """What every reward can do."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 scores, shape (N,), of uint8 images (N, height, width, 3) for N prompts."""
        ...


def check_kind(spec: Reward) -> None:
    """Refuse a reward whose module is not there, without importing it: it may be heavy."""
    if spec.kind in BUILT_IN:
        return
    module, _, name = spec.kind.partition(":")
    if not name:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}: use {', '.join(BUILT_IN)}, or your own "
            "class as module:Class"
        )
    try:
        there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}: there is no module {module!r} on the "
            "Python path (the working directory is on it)"
        )


def load(spec: Reward, device: torch.device) -> Any:
    """Make a reward from its specification."""
    if spec.kind in BUILT_IN:
        return _find(spec)(spec, device)
    return _find(spec)()


def _find(spec: Reward) -> Any:
    module, _, name = BUILT_IN.get(spec.kind, spec.kind).partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}, which cannot be imported: {error}"
        ) from error
    if not callable(getattr(found, "score", None)):
        raise ConfigError(f"reward {spec.name!r}: {spec.kind} has no method score(images, prompts)")
    return found


class Panel:
    """Several rewards on one device, their answers checked."""

    def __init__(self, specs: Sequence[Reward], device: torch.device) -> None:
        self.rewards = {spec.name: load(spec, device) for spec in specs}

    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Scores by reward, float32 of shape (N,).

        Raises:
            ValueError: names the reward that answered with a wrong count or a value that is not
                finite.
        """
        return {n: checked(n, self.rewards[n].score(images, prompts), prompts) for n in names}

    def embed(self, images: np.ndarray) -> np.ndarray | None:
        """Unit vectors of the first reward that has them, float32 (N, D)."""
        able = (r for r in self.rewards.values() if hasattr(r, "embed"))
        reward = next(able, None)
        if reward is None:
            return None
        vectors = np.asarray(reward.embed(images), np.float32)
        if len(vectors) != len(images) or not np.isfinite(vectors).all():
            raise ValueError(
                f"{type(reward).__name__}.embed returned shape {vectors.shape} or values that are "
                f"not finite for {len(images)} pictures"
            )
        return vectors


def checked(name: str, scores: object, prompts: Sequence[str]) -> np.ndarray:
    """Scores as float32 of shape (N,), or a ValueError that names the reward."""
    try:
        values = np.asarray(scores, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} returned no array of numbers: {error}") from error
    if values.shape != (len(prompts),):
        raise ValueError(
            f"reward {name!r} returned scores of shape {values.shape} for {len(prompts)} pictures"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"reward {name!r} returned {values[bad[0]]} for the prompt {prompts[bad[0]]!r} "
            f"({len(bad)} of {len(values)} scores are not finite)"
        )
    return values


def refuse_constant(name: str, scores: np.ndarray) -> None:
    """A reward that says the same of every picture teaches nothing: a ValueError names it."""
    if scores.size > 1 and float(scores.max()) == float(scores.min()):
        raise ValueError(
            f"reward {name!r} returned {float(scores.flat[0])} for all {scores.size} pictures: a "
            "constant reward cannot be trained on"
        )
