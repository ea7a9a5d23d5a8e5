"""The rewards: their protocol, their registry, and one file for each.

A reward is a class with a method `score(images, prompts)`, which takes uint8 images of shape
(N, height, width, 3) and N prompts and returns N float32 scores. The same input has to give the
same scores. A method `embed(images)` is optional; it returns unit vectors of shape (N, D), from
which diversity is computed. Built-in rewards are constructed with `(spec, options, device)`. Your
own class, named as `module:Class`, is constructed without arguments, and your own function, named
as `module:function`, is called as `score` is.
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
from b2ray.config.secrets import shown
from b2ray.errors import ConfigError
from b2ray.imports import gc_paused
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


class RewardModel(Protocol):
    """The interface of every reward."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Score images for their prompts.

        Args:
            images: uint8, shape (N, height, width, 3).
            prompts: the prompt of each image, length N.

        Returns:
            float32, shape (N,).
        """
        ...


def check(spec: Reward) -> None:
    """Check that a reward's module exists and that its options are valid.

    Neither the module nor anything heavy is imported. If the reward has its own Python environment,
    the module is not looked for here.

    Args:
        spec: the reward's specification.

    Raises:
        ConfigError: the kind is unknown, the module does not exist, or an option is wrong.
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
        exists = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        exists = False
    if not exists:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}: there is no module {module!r} on the "
            "Python path (the working directory is on it)"
        )


def options(spec: Reward) -> Section:
    """Validate the options of a reward.

    Returns:
        The options as the model of the reward's kind (`b2ray.rewards.options.OPTIONS`).

    Raises:
        ConfigError: an option is unknown or has a wrong value, or a user's own reward has options.
    """
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


def load(spec: Reward, device: torch.device) -> RewardModel:
    """Construct a reward from its specification.

    Args:
        spec: the reward's specification.
        device: the device on which a built-in reward computes.

    Raises:
        ConfigError: the reward cannot be imported, its model cannot be loaded, or it has no method
            `score`.
    """
    reward = _imported(spec)
    if spec.kind in BUILT_IN:
        return reward(spec, options(spec), device)
    if isinstance(reward, type):
        reward = reward()
    if callable(getattr(reward, "score", None)):
        return reward
    if callable(reward):
        return _FunctionReward(reward)
    raise ConfigError(
        f"reward {spec.name!r}: {spec.kind} is neither a function nor has it a method "
        "score(images, prompts)"
    )


class _FunctionReward:
    """A user's own function as a reward."""

    def __init__(self, function: Any) -> None:
        self.score = function


def _imported(spec: Reward) -> Any:
    """Import the class, function or object that the reward's kind names."""
    module_name, _, name = BUILT_IN.get(spec.kind, spec.kind).partition(":")
    try:
        with gc_paused() if spec.kind in BUILT_IN else contextlib.nullcontext():
            module = importlib.import_module(module_name)
        return getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward {spec.name!r} has kind {spec.kind!r}, which cannot be imported: {error}"
        ) from error


class Panel:
    """Several rewards on one device, whose scores are checked.

    Args:
        specs: the rewards' specifications.
        device: the device of all rewards.

    Raises:
        ConfigError: as in `load`.
    """

    def __init__(self, specs: Sequence[Reward], device: torch.device) -> None:
        self.rewards = {spec.name: load(spec, device) for spec in specs}
        self._batch_sizes = {spec.name: spec.batch for spec in specs}

    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Score images with some of the rewards.

        Args:
            images: uint8, shape (N, height, width, 3).
            prompts: the prompt of each image, length N.
            names: names of the rewards.

        Returns:
            The scores by reward, float32, shape (N,).

        Raises:
            ValueError: a reward, which the message names, returned a wrong number of scores or a
                score that is not finite.
        """
        return {n: self._score(n, images, prompts) for n in names}

    def _score(self, name: str, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        reward, size = self.rewards[name], self._batch_sizes[name]
        parts = [np.empty(0, np.float32)]
        for low in range(0, len(prompts), size):
            batch = list(prompts[low : low + size])
            parts.append(checked(name, reward.score(images[low : low + size], batch), batch))
        return np.concatenate(parts)

    def embed(self, images: np.ndarray) -> np.ndarray | None:
        """Embed images with the first reward that can.

        Args:
            images: uint8, shape (N, height, width, 3).

        Returns:
            Unit vectors, float32, shape (N, D); None if no reward has a method `embed`.

        Raises:
            ValueError: the reward returned a wrong number of vectors or values that are not finite.
        """
        embedding_rewards = (r for r in self.rewards.values() if hasattr(r, "embed"))
        reward = next(embedding_rewards, None)
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
    """Check the scores of a reward and convert them to float32.

    Args:
        name: name of the reward, for messages.
        scores: what the reward returned.
        prompts: the prompts that were scored, length N.

    Returns:
        float32, shape (N,).

    Raises:
        ValueError: the scores are no array of N finite numbers.
    """
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
    """Refuse scores that are equal for all pictures, because nothing can be learned from them.

    Args:
        name: name of the reward, for the message.
        scores: its scores, of any shape.

    Raises:
        ValueError: there are several scores, and all are equal.
    """
    if scores.size > 1 and float(scores.max()) == float(scores.min()):
        raise ValueError(
            f"reward {name!r} returned {float(scores.flat[0])} for all {scores.size} pictures: a "
            "constant reward cannot be trained on"
        )
