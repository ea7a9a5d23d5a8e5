"""Checks of the files that a configuration names, before Ray, torch or a model is started."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from b2ray.algorithm.branching import stage_groups
from b2ray.config import Config, Reward
from b2ray.config.paths import find
from b2ray.diffusion.families import FAMILIES
from b2ray.errors import ConfigError
from b2ray.prompts import PromptSet, PromptSets, read
from b2ray.prompts.demonstrations import Demonstration, read_folder
from b2ray.rewards import check
from b2ray.tracking.mlflow import model


def check_files(config: Config) -> PromptSets:
    """Check all files that a configuration names, and read its prompts and demonstrations.

    Raises:
        ConfigError: a file is missing or wrong; the sentence names the field and the remedy.
    """
    check_model(config.model.path)
    problem = model.problem(config)
    if problem:
        raise ConfigError(problem)
    check_rewards(config.all_rewards)
    prompts = read_prompts(config)
    _check_spread(config, prompts.train)
    return prompts


def _check_spread(config: Config, prompts: PromptSet) -> None:
    """Refuse `curriculum.extend=spread` where no stage can measure the share that it needs."""
    if config.curriculum.extend != "spread" or config.advantage.window:
        return
    counts = Counter(group.prompt for group in stage_groups(config, prompts, 0))
    if max(counts.values()) < 2:
        raise ConfigError(
            "curriculum.extend is spread, which needs two groups of a prompt, but a stage has one "
            "of each and advantage.window is 0: raise advantage.window or branching.images, or use "
            "curriculum.extend=calendar"
        )


def check_rewards(rewards: Iterable[Reward]) -> None:
    """Refuse a reward of an unknown kind, with wrong options or without its local model.

    Raises:
        ConfigError: names the reward and the remedy.
    """
    for reward in rewards:
        check(reward)
        if reward.path and find(reward.path) is None and not _may_be_hub_id(reward.path):
            raise ConfigError(f"reward {reward.name!r}: there is no folder {reward.path!r}")


def read_prompts(config: Config) -> PromptSets:
    """Read the prompts and the demonstrations of a configuration.

    Raises:
        ConfigError: a file or the folder of demonstrations is missing or wrong.
    """
    train, heldout = config.prompts.train, config.prompts.heldout
    folder = config.demonstrations.path
    demonstrations = read_folder(folder) if folder else ()
    return PromptSets(
        _captions(demonstrations) if train is None else read("prompts.train", train),
        read("prompts.heldout", heldout) if heldout else None,
        demonstrations,
    )


def _captions(demonstrations: Sequence[Demonstration]) -> PromptSet:
    """The captions as prompts, each with the number of its demonstrations as its weight."""
    counts = Counter(d.caption for d in demonstrations)
    return PromptSet(tuple(counts), tuple(map(float, counts.values())))


def check_model(path: str) -> None:
    """Refuse a local folder or file that cannot be a pipeline of a known family.

    Args:
        path: a local path, or a hub id, which is not checked.

    Raises:
        ConfigError: says what is wrong with it, and the remedy.
    """
    local = find(path)
    if local is None:
        if not _may_be_hub_id(path):
            raise ConfigError(
                f"model.path: there is no file or folder {path!r}, and it is no hub id either"
            )
        return
    if local.is_file():
        if local.suffix != ".safetensors":
            raise ConfigError(
                f"model.path {path!r}: a single file must be .safetensors; pickled checkpoints run "
                "code when they are loaded, convert yours first"
            )
        return
    index = local / "model_index.json"
    if not index.is_file():
        raise ConfigError(
            f"model.path {path!r} is no diffusers pipeline: it has no model_index.json; "
            "give a folder written by save_pretrained, a .safetensors file, or a hub id"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.path: {index} cannot be read: {error}") from error
    # In place of a name there may be a list, which cannot be looked up in a mapping: it refers to
    # code beside the weights.
    if kind not in [*FAMILIES]:
        raise ConfigError(f"model.path {path!r} is a {kind}: {' or '.join(FAMILIES)} is needed")


def _may_be_hub_id(path: str) -> bool:
    """Whether a path has the form of a hub id, `owner/name`, and not that of a local path."""
    return path.count("/") == 1 and not Path(path).is_absolute() and not path.startswith(".")
