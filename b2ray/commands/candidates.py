"""What `b2ray evaluate` compares: the policies, and the setting that all of them share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from b2ray.commands.common import configuration, quiet, with_sampling
from b2ray.config import Config, Model, Reward
from b2ray.config.load import overridden, read_yaml, sentence
from b2ray.config.rewards import name_problem
from b2ray.diffusion.lora_file import State, digest
from b2ray.errors import ConfigError
from b2ray.evaluation.statistics import Unit
from b2ray.preflight import check_model, check_rewards, read_prompts
from b2ray.prompts import read
from b2ray.prompts.templates import BUILT_IN
from b2ray.rewards.combine import Statistics
from b2ray.tracking.trained import Trained, find_trained, reference

BASE = "base model"


@dataclass(frozen=True)
class Candidate:
    """A policy to evaluate: a base model, with or without a LoRA.

    Attributes:
        name: its name in tables and above pictures.
        model: the base model; its `lora` describes the adapter that the weights are of.
        weights: the LoRA; None for the base model alone.
        source: where the LoRA comes from, for the JSON output.
    """

    name: str
    model: Model
    weights: State | None
    source: Mapping[str, Any]

    def named(self) -> dict[str, Any]:
        """Return which policy this is, for the JSON output."""
        lora = None if self.weights is None else digest(self.weights)
        return {"name": self.name, "model": self.model.path, "digest": lora, **self.source}


@dataclass(frozen=True)
class Setting:
    """What all candidates share.

    Attributes:
        config: the rewards, sampling, seed and workers; its model is not used.
        sets: the prompts by the name of the prompt set.
        units: whether pictures or prompts count as independent, for each prompt set.
        count: the number of pictures of each prompt set.
        reference: (mean, std) that standardise the rewards with `scale=window`, by reward; None
            takes those of the first candidate.
        notes: sentences that the reader of the results has to know.
    """

    config: Config
    sets: Mapping[str, tuple[str, ...]]
    units: Mapping[str, Unit]
    count: int
    reference: Statistics | None
    notes: tuple[str, ...]


def candidates(args: argparse.Namespace) -> tuple[list[Candidate], Setting]:
    """Return the one or two policies that the command line asks for, and their setting.

    Args:
        args: the parsed command line of `b2ray evaluate`.

    Raises:
        ConfigError: a run, a file or an option is wrong.
    """
    if len(args.run) + len(args.lora) > 2:
        raise ConfigError("more than two policies are given: compare two at a time")
    # Read the runs; the first one decides the setting, unless --config is given.
    stages = [args.stage, None]
    runs = [find_trained(run, args.runs, n) for run, n in zip(args.run, stages, strict=False)]
    configs = [overridden(read_yaml(t.path / "config.yaml"), args.fields) for t in runs]
    config_of_run = configs[0] if configs and not args.config else None
    config = config_of_run or configuration(args)

    # A single LoRA is compared with its base model.
    policies = [_of_run(*pair) for pair in zip(runs, configs, strict=True)]
    policies += [_of_file(Path(file).expanduser(), config.model) for file in args.lora]
    if not policies:
        policies = [Candidate(BASE, config.model, None, {})]
    elif len(policies) == 1:
        policies = [Candidate(BASE, policies[0].model, None, {}), *policies]
    for candidate in policies:
        check_model(candidate.model.path)
    statistics = reference(runs[0].path) if config_of_run else None
    return _with_distinct_names(policies), _setting(config, args, statistics, configs)


def _of_run(trained: Trained, config: Config) -> Candidate:
    is_finished = trained.stage == config.curriculum.stages
    name = config.name if is_finished else str(trained)
    return Candidate(name, config.model, trained.weights, trained.named())


def _of_file(path: Path, model: Model) -> Candidate:
    quiet()
    from b2ray.diffusion.lora_import import find_file, read_lora  # imports torch

    file = find_file(path)
    weights, lora = read_lora(file)
    name = path.name if path.is_dir() else path.stem
    model_with_lora = model.model_copy(update={"lora": lora})
    return Candidate(name, model_with_lora, weights, {"file": str(file)})


def _with_distinct_names(policies: list[Candidate]) -> list[Candidate]:
    """Add the folder or file to the names of two policies that have the same name."""
    if len({c.name for c in policies}) == len(policies):
        return policies
    sources = [c.source.get("folder") or c.source.get("file") for c in policies]
    if len(set(sources)) < len(sources):
        raise ConfigError(f"{policies[0].name!r} is given twice: compare it with another")
    return [replace(c, name=f"{c.name} ({s})") for c, s in zip(policies, sources, strict=True)]


def _setting(
    config: Config, args: argparse.Namespace, statistics: Statistics | None, runs: Sequence[Config]
) -> Setting:
    """Apply the options of the command line to the configuration.

    Args:
        config: the configuration that decides what no option does.
        args: the parsed command line.
        statistics: the reference of the first run.
        runs: the configurations of all runs, to note how their sampling differs.
    """
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
        # A run is about its training prompts themselves; other sets are samples of prompts.
        name: args.unit or ("picture" if name == "train" and not args.prompts else "prompt")
        for name in sets
    }
    evaluation = config.evaluation
    count = args.images or max(evaluation.final_images, evaluation.images)
    notes = tuple(
        f"{run.name} was trained with other sampling settings ({field}: {trained}, here {value})"
        for run in runs
        for field, value in config.sampling.model_dump().items()
        if (trained := getattr(run.sampling, field)) != value
    )
    return Setting(config, sets, units, count, statistics, notes)


def _with_rewards(config: Config, document: str) -> Config:
    """Replace the configuration's rewards by those of a JSON document, as held-out rewards."""
    try:
        rewards = TypeAdapter(tuple[Reward, ...]).validate_json(document)
    except ValidationError as error:
        example = '[{"name": "clip", "kind": "clip", "path": "FOLDER"}]'
        raise ConfigError(f"--rewards: {sentence(error)}; for example: {example}") from error
    evaluation = config.evaluation.model_copy(update={"heldout_rewards": rewards})
    config = config.model_copy(update={"rewards": (), "evaluation": evaluation})
    problem = name_problem(config)
    if problem:
        raise ConfigError(f"--rewards: {problem}")
    return config


def _sets(values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read the prompt sets of --prompts, by the name of the file or of the built-in set."""
    sets: dict[str, tuple[str, ...]] = {}
    for value in values:
        name = value if value in BUILT_IN else Path(value).stem
        if name in sets:
            raise ConfigError(f"--prompts: two sets are called {name!r}: rename one of the files")
        sets[name] = read("--prompts", value).texts
    return sets
