"""What can be refused before Ray, torch or a model is started: the files a configuration names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from b2ray.config import Config
from b2ray.errors import ConfigError
from b2ray.options import find
from b2ray.rewards import check


@dataclass(frozen=True)
class PromptSets:
    """The prompts of a run; `heldout` may be empty."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def evaluated(self) -> dict[str, tuple[str, ...]]:
        """The sets that an evaluation looks at, by name."""
        return {n: s for n, s in (("train", self.train), ("heldout", self.heldout)) if s}


def check_files(config: Config) -> PromptSets:
    """Read the prompt files and look at the model folder.

    Raises:
        ConfigError: one sentence that names the field and the remedy.
    """
    check_model(config.model.path)
    for reward in config.all_rewards:
        check(reward)
        if reward.path and find(reward.path) is None and not _may_be_hub_id(reward.path):
            raise ConfigError(f"reward {reward.name!r}: there is no folder {reward.path!r}")
    heldout = config.prompts.heldout
    return PromptSets(
        read_prompts("prompts.train", config.prompts.train),
        read_prompts("prompts.heldout", heldout) if heldout else (),
    )


def read_prompts(field: str, path: str) -> tuple[str, ...]:
    """The non-empty lines of a UTF-8 text file; lines that start with # are comments."""
    file = find(path)
    if file is None or not file.is_file():
        raise ConfigError(
            f"{field}: there is no file {path!r}; give a text file, one prompt a line"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path!r} cannot be read as UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise ConfigError(f"{field}: {path!r} has no prompts; write one a line")
    return prompts


def check_model(path: str) -> None:
    """Refuse a local folder that is plainly no Stable Diffusion pipeline."""
    folder = find(path)
    if folder is None:
        if not _may_be_hub_id(path):
            raise ConfigError(
                f"model.path: there is no folder {path!r}, and it is no hub id either"
            )
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(
            f"model.path {path!r} is no diffusers pipeline: it has no model_index.json; "
            "give a folder written by save_pretrained, or a hub id"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.path: {index} cannot be read: {error}") from error
    if kind != "StableDiffusionPipeline":
        raise ConfigError(
            f"model.path {path!r} is a {kind}: a StableDiffusionPipeline (SD 1.x) is needed"
        )


def _may_be_hub_id(path: str) -> bool:
    """An `owner/name`; a path that is meant to be local has another form."""
    return path.count("/") == 1 and not Path(path).is_absolute() and not path.startswith(".")
