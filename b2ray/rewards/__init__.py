"""Rewards: one protocol, one registry, one file each.

A reward is a class with `score(images, prompts)`, images uint8 of shape (N, height, width, 3),
returning N float32 scores; the same input gives the same scores. It may have `embed(images)`, which
returns unit vectors of shape (N, D) for the diversity figures. Built-in rewards are made with
`(spec, options, device)`; your own class, named as `module:Class`, is made without arguments, and
your own function, `module:function`, is called as `score` is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import ValidationError

from b2ray.config import Reward, Section
from b2ray.discretion import shown
from b2ray.errors import ConfigError
from b2ray.imports import uncollected
from b2ray.rewards.options import OPTIONS

if TYPE_CHECKING:
    import torch

BUILT_IN = {
    "aesthetic": "b2ray.rewards.aesthetic:Aesthetic",
    "bertscore": "b2ray.rewards.bertscore:BertScore",
    "clip": "b2ray.rewards.clip:Clip",
    "hps": "b2ray.rewards.hps:Hps",
    "http": "b2ray.rewards.http:Http",
    "imagereward": "b2ray.rewards.imagereward:ImageReward",
    "jpeg_compressibility": "b2ray.rewards.jpeg:Compressibility",
    "jpeg_incompressibility": "b2ray.rewards.jpeg:Incompressibility",
    "pickscore": "b2ray.rewards.clip:PickScore",
}


class Scorer(Protocol):
    """What every reward can do."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 scores, shape (N,), of uint8 images (N, height, width, 3) for N prompts."""
        ...


def check(spec: Reward) -> None:
    """Refuse a reward whose module is not there or whose options are wrong.

    Nothing heavy is imported. A module that comes with the reward's own Python environment is
    looked for only there.
    """
    options(spec)
    if spec.kind in BUILT_IN:
        return
    module, _, name = spec.kind.partition(":")
    if not name:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}: use {', '.join(BUILT_IN)}, or your own "
            "function or class as module:name"
        )
    if spec.workers is not None and spec.workers.runtime_env:
        return
    try:
        there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}: there is no module {module!r} on the "
            "Python path (the working directory is on it)"
        )


def options(spec: Reward) -> Section:
    """The options of a reward as its kind's model."""
    model = OPTIONS.get(spec.kind)
    if model is None:
        if spec.options:
            raise ConfigError(
                f"reward {spec.name!r} has options, but {spec.kind!r} is your own code, which gets "
                "none: read them there from the environment or a file"
            )
        return Section()
    try:
        return model(**spec.options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["options", *map(str, first["loc"])])
        known = ", ".join(model.model_fields) or "none"
        raise ConfigError(
            f"reward {spec.name!r}: {field} is {shown(field, first['input'])}: "
            f"{first['msg'].lower()} "
            f"(options of {spec.kind}: {known})"
        ) from error


def load(spec: Reward, device: torch.device) -> Scorer:
    """Make a reward from its specification."""
    found = _find(spec)
    if spec.kind in BUILT_IN:
        return found(spec, options(spec), device)
    if isinstance(found, type):
        found = found()
    if callable(getattr(found, "score", None)):
        return found
    if callable(found):
        return _Function(found)
    raise ConfigError(
        f"reward {spec.name!r}: {spec.kind} is neither a function nor has it a method "
        "score(images, prompts)"
    )


class _Function:
    """Your own function as a reward."""

    def __init__(self, function: Any) -> None:
        self.score = function


def _find(spec: Reward) -> Any:
    module, _, name = BUILT_IN.get(spec.kind, spec.kind).partition(":")
    try:
        with uncollected() if spec.kind in BUILT_IN else contextlib.nullcontext():
            found = importlib.import_module(module)
        return getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}, which cannot be imported: {error}"
        ) from error


class Panel:
    """Several rewards on one device, their answers checked."""

    def __init__(self, specs: Sequence[Reward], device: torch.device) -> None:
        self.rewards = {spec.name: load(spec, device) for spec in specs}
        self._batch = {spec.name: spec.batch for spec in specs}

    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Scores by reward, float32 of shape (N,).

        Raises:
            ValueError: names the reward that answered with a wrong count or a value that is not
                finite.
        """
        return {n: self._score(n, images, prompts) for n in names}

    def _score(self, name: str, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        reward, batch = self.rewards[name], self._batch[name]
        parts = [np.empty(0, np.float32)]
        for low in range(0, len(prompts), batch):
            some = list(prompts[low : low + batch])
            parts.append(checked(name, reward.score(images[low : low + batch], some), some))
        return np.concatenate(parts)

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
