"""What `b2ray evaluate` looks at: the policies, and the setting in which all of them draw."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from b2ray.checks import check_model, check_rewards, read_prompts
from b2ray.commands.common import configuration, quiet, with_sampling
from b2ray.confidence import Unit
from b2ray.config import Config, Model, Reward
from b2ray.diffusion.lora_file import State, digest
from b2ray.errors import ConfigError
from b2ray.options import overridden, read_yaml, sentence
from b2ray.prompts import read
from b2ray.prompts.templates import BUILT_IN
from b2ray.rewards.combine import Statistics
from b2ray.tracking.trained import Trained, find_trained, reference

BASE = "base model"


@dataclass(frozen=True)
class Candidate:
    """A policy: a base model, with a LoRA or as it is.

    Attributes:
        name: in tables and above pictures.
        model: its `lora` is the adapter that the weights fit.
        weights: the LoRA; None for the base model.
        source: where the LoRA is from, for programs.
    """

    name: str
    model: Model
    weights: State | None
    source: Mapping[str, Any]

    def named(self) -> dict[str, Any]:
        """Which it is, for programs."""
        bound = None if self.weights is None else digest(self.weights)
        return {"name": self.name, "model": self.model.path, "digest": bound, **self.source}


@dataclass(frozen=True)
class Setting:
    """What all candidates have in common.

    Attributes:
        config: rewards, sampling, seed, and the fleet; its model is not used.
        sets: the prompts by the name of their set.
        units: of each set, what counts as independent.
        count: pictures of each set.
        reference: as in `evaluation.evaluated`.
        notes: what to know about the figures.
    """

    config: Config
    sets: Mapping[str, tuple[str, ...]]
    units: Mapping[str, Unit]
    count: int
    reference: Statistics | None
    notes: tuple[str, ...]


def candidates(args: argparse.Namespace) -> tuple[list[Candidate], Setting]:
    """The one or two policies that the command line asks for, and their setting.

    Raises:
        ConfigError: a run, a file or an option does not allow it.
    """
    if len(args.run) + len(args.lora) > 2:
        raise ConfigError("more than two policies are given: compare two at a time")
    stages = [args.stage, None]
    found = [find_trained(run, args.runs, n) for run, n in zip(args.run, stages, strict=False)]
    configs = [overridden(read_yaml(t.path / "config.yaml"), args.fields) for t in found]
    own = configs[0] if configs and not args.config else None
    config = own or configuration(args)
    given = [_of_run(*pair) for pair in zip(found, configs, strict=True)]
    given += [_of_file(Path(file).expanduser(), config.model) for file in args.lora]
    if not given:
        given = [Candidate(BASE, config.model, None, {})]
    elif len(given) == 1:
        given = [Candidate(BASE, given[0].model, None, {}), *given]
    for candidate in given:
        check_model(candidate.model.path)
    fixed = reference(found[0].path) if own else None
    return _told_apart(given), _setting(config, args, fixed, configs)


def _of_run(found: Trained, config: Config) -> Candidate:
    whole = found.stage == config.curriculum.stages
    name = config.name if whole else str(found)
    return Candidate(name, config.model, found.weights, found.named())


def _of_file(path: Path, model: Model) -> Candidate:
    quiet()
    from b2ray.diffusion.lora_import import find_file, read_lora  # heavy

    file = find_file(path)
    weights, lora = read_lora(file)
    name = path.name if path.is_dir() else path.stem
    fitting = model.model_copy(update={"lora": lora})
    return Candidate(name, fitting, weights, {"file": str(file)})


def _told_apart(given: list[Candidate]) -> list[Candidate]:
    """Two of one name get their places, too."""
    if len({c.name for c in given}) == len(given):
        return given
    places = [c.source.get("folder") or c.source.get("file") for c in given]
    if len(set(places)) < len(places):
        raise ConfigError(f"{given[0].name!r} is given twice: compare it with another")
    return [replace(c, name=f"{c.name} ({p})") for c, p in zip(given, places, strict=True)]


def _setting(
    config: Config, args: argparse.Namespace, fixed: Statistics | None, runs: Sequence[Config]
) -> Setting:
    config = with_sampling(config, args)
    if args.seed is not None:
        config = config.model_copy(update={"seed": args.seed})
    if args.rewards:
        config = _with_rewards(config, args.rewards)
    if not config.all_rewards:
        raise ConfigError("there is nothing to measure: give --rewards, as JSON")
    check_rewards(config.all_rewards)
    sets = _sets(args.prompts) if args.prompts else read_prompts(config).evaluated()
    units: dict[str, Unit] = {
        # The training prompts are all there are; others stand for prompts like them.
        name: args.unit or ("picture" if name == "train" and not args.prompts else "prompt")
        for name in sets
    }
    evaluation = config.evaluation
    count = args.images or max(evaluation.final_images, evaluation.images)
    notes = tuple(
        f"{run.name} was trained with other sampling settings ({field}: {theirs}, here {here})"
        for run in runs
        for field, here in config.sampling.model_dump().items()
        if (theirs := getattr(run.sampling, field)) != here
    )
    return Setting(config, sets, units, count, fixed, notes)


def _with_rewards(config: Config, given: str) -> Config:
    """Other rewards in the place of the configuration's; none of them is trained on."""
    try:
        rewards = TypeAdapter(tuple[Reward, ...]).validate_json(given)
    except ValidationError as error:
        example = '[{"name": "clip", "kind": "clip", "path": "FOLDER"}]'
        raise ConfigError(f"--rewards: {sentence(error)}; for example: {example}") from error
    evaluation = config.evaluation.model_copy(update={"heldout_rewards": rewards})
    config = config.model_copy(update={"rewards": (), "evaluation": evaluation})
    problem = config.name_problem()
    if problem:
        raise ConfigError(f"--rewards: {problem}")
    return config


def _sets(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    sets: dict[str, tuple[str, ...]] = {}
    for value in given:
        name = value if value in BUILT_IN else Path(value).stem
        if name in sets:
            raise ConfigError(f"--prompts: two sets are called {name!r}: rename one of the files")
        sets[name] = read("--prompts", value).texts
    return sets
