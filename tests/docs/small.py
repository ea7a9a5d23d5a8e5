"""A run's or a check's command line with the same meaning on small models, done in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from b2ray.config import Config
from b2ray.config.load import parse
from b2ray.config.paths import find
from tests.runner import ROOT

SHAPES = ROOT / "b2ray" / "shapes" / "weights"
CPU = {"gpus": 0, "cpus": 0.25}


def shortened(argv: list[str], models: Path) -> tuple[list[str], Config]:
    """The arguments with few stages, few pictures, one sampler, no GPU, and small models in the
    place of those from a hub; and the configuration that they give.

    Args:
        argv: what follows `python -m b2ray.run` or `b2ray check`.
        models: a folder with `base`, `xl` and `reward`.
    """
    given = parse(argv)
    over = fields(given.config, models)
    if "--resume" in argv:  # only what may change
        over = {key: value for key, value in over.items() if key.startswith("fleet.")}
    kept = [word for word in argv if word.partition("=")[0].removeprefix("--") not in over]
    more = [f"--{key}={text(value)}" for key, value in over.items()]
    return [*kept, *more], parse([*kept, *more]).config


def fields(config: Config, models: Path) -> dict[str, Any]:
    """What is changed, field by field."""
    branches = config.branching.branches
    sampler = {f"fleet.samplers.{key}": value for key, value in {**CPU, "max": 1}.items()}
    found: dict[str, Any] = {
        "curriculum.stages": 1,
        "branching.images": 2 * branches,
        "branching.unit_groups": 2,
        "branching.branch_batch": 8,
        "learner.batch": 4 if config.learner.batch != "all" else "all",
        "learner.microbatch": 8,
        "evaluation.every": 0,
        "evaluation.images": 4,
        "evaluation.final_images": 4,
        "evaluation.batch": 4,
        "evaluation.previews": 2,
        **sampler,
        **{f"fleet.scorers.{key}": value for key, value in {**CPU, "count": 1}.items()},
        **{f"fleet.learner.{key}": value for key, value in CPU.items()},
    }
    if find(config.model.path) is None:
        base = "xl" if "xl" in config.model.path else "base"
        found |= {"model.path": models / base, "sampling.height": None, "sampling.width": None}
    for key, rewards in {
        "rewards": config.rewards,
        "evaluation.heldout_rewards": config.evaluation.heldout_rewards,
    }.items():
        if any(reward.path or reward.kind in stand_ins(models) for reward in rewards):
            found[key] = [stand_in(r.model_dump(mode="json"), models) for r in rewards]
    return found


def stand_in(reward: dict[str, Any], models: Path) -> dict[str, Any]:
    """The same reward on a small model; what ships with the package stays as it is."""
    if reward["path"] and find(reward["path"]) is not None:
        return reward
    return {**reward, **stand_ins(models).get(reward["kind"], {}), "revision": None}


def stand_ins(models: Path) -> dict[str, dict[str, Any]]:
    """By kind: a small model."""
    return {
        "clip": {"path": str(models / "reward")},
        "aesthetic": {"path": str(SHAPES / "aesthetic")},
        "imagereward": {"path": str(SHAPES / "imagereward")},
    }


def text(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')
