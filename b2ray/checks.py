"""What can be refused before Ray, torch or a model is started: the files a configuration names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from b2ray.config import Config, Reward
from b2ray.demonstrations import Demonstration, read_folder
from b2ray.diffusion.families import FAMILIES
from b2ray.errors import ConfigError
from b2ray.options import find
from b2ray.prefixes import Pool
from b2ray.prompts import PromptSet, PromptSets, read
from b2ray.rewards import check
from b2ray.tracking import mlflow_model


def check_files(config: Config) -> PromptSets:
    """Read the prompt files and the demonstrations, and look at the model folder.

    Raises:
        ConfigError: one sentence that names the field and the remedy.
    """
    check_model(config.model.path)
    problem = mlflow_model.problem(config)
    if problem:
        raise ConfigError(problem)
    check_rewards(config.all_rewards)
    prompts = read_prompts(config)
    _check_spread(config, prompts.train)
    return prompts


def _check_spread(config: Config, prompts: PromptSet) -> None:
    """Refuse an interval that would wait for a share which no stage can measure."""
    if config.curriculum.extend != "spread" or config.advantage.window:
        return
    counts = Counter(group.prompt for group in Pool(config, prompts).groups(0))
    if max(counts.values()) < 2:
        raise ConfigError(
            "curriculum.extend is spread, which needs two groups of a prompt, but a stage has one "
            "of each and advantage.window is 0: raise advantage.window or branching.images, or use "
            "curriculum.extend=calendar"
        )


def check_rewards(rewards: Iterable[Reward]) -> None:
    """Refuse a reward whose kind, options or local model are not there."""
    for reward in rewards:
        check(reward)
        if reward.path and find(reward.path) is None and not _may_be_hub_id(reward.path):
            raise ConfigError(f"reward {reward.name!r}: there is no folder {reward.path!r}")


def read_prompts(config: Config) -> PromptSets:
    """The prompt files and the demonstrations of a configuration."""
    train, heldout = config.prompts.train, config.prompts.heldout
    folder = config.demonstrations.path
    shown = read_folder(folder) if folder else ()
    return PromptSets(
        _captions(shown) if train is None else read("prompts.train", train),
        read("prompts.heldout", heldout) if heldout else None,
        shown,
    )


def _captions(shown: Sequence[Demonstration]) -> PromptSet:
    """The captions as prompts, each drawn as often as it has demonstrations."""
    counts = Counter(d.caption for d in shown)
    return PromptSet(tuple(counts), tuple(map(float, counts.values())))


def check_model(path: str) -> None:
    """Refuse a local folder or file that is plainly no pipeline of a known family."""
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
    if kind not in [*FAMILIES]:  # a list would name code beside the weights
        raise ConfigError(f"model.path {path!r} is a {kind}: {' or '.join(FAMILIES)} is needed")


def _may_be_hub_id(path: str) -> bool:
    """An `owner/name`; a path that is meant to be local has another form."""
    return path.count("/") == 1 and not Path(path).is_absolute() and not path.startswith(".")
