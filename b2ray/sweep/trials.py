"""From sweep.yaml to trials: whole configurations, all of them checked before one starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from b2ray.checks import check_files
from b2ray.config import SUMMARY_WORDS, Config
from b2ray.discretion import shown
from b2ray.errors import ConfigError
from b2ray.options import Words, base, find, merge, read_yaml, resolved
from b2ray.sweep.spec import Sweep, split
from b2ray.sweep.values import points
from b2ray.tracking.folder import refuse_foreign
from b2ray.tracking.mlflow_names import tracking_uri

# How the figures of metrics.jsonl begin.
FIGURES = (
    *("branch", "cost", "demonstrations", "diversity", "eval", "fleet", "heldout", "memory"),
    *("policy", "prefix", "replay", "reward", "throughput", "time"),
)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: what it has of the fields that are varied.
        config: its whole configuration; its name is the trial's, its `runs` the sweep's folder.
    """

    values: Mapping[str, Any]
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.config.runs) / self.config.name

    @property
    def setting(self) -> dict[str, Any]:
        """Its values without the seed."""
        return {k: v for k, v in self.values.items() if k != "seed"}


@dataclass(frozen=True)
class Plan:
    """A sweep with all its trials.

    Attributes:
        fields: what the file and the command line set of the configuration.
        folder: runs/NAME.
    """

    sweep: Sweep
    fields: Mapping[str, Any]
    trials: tuple[Trial, ...]
    folder: Path


def plan(words: Words) -> Plan:
    """Read a sweep's file with the command line over it, and resolve and check every trial.

    Raises:
        ConfigError: the first thing that is wrong, with the trial, the field and the value.
    """
    sweep, own = _read(words)
    given = {k: v for k, v in words.fields.items() if k != "name"}
    _refuse_both(sweep, given)
    low = base(words.config or sweep.config, False, {})
    trials = []
    for point in points(sweep):
        try:
            config = resolved(low, own, given, point.nested())
            check_files(config)
            _check_metric(sweep.metric, config)
            trial = _placed(Trial(point.values, config), sweep.name, point.name)
            refuse_foreign(trial.config, trial.path)
        except ConfigError as error:
            raise ConfigError(f"trial {point.name}: {error}") from error
        trials.append(trial)
    return Plan(sweep, merge(own, given), tuple(trials), trials[0].path.parent)


def _read(words: Words) -> tuple[Sweep, dict[str, Any]]:
    """The file; a --name of the command line is the sweep's."""
    assert words.sweep is not None
    file = find(words.sweep)
    if file is None or not file.is_file():
        raise ConfigError(f"--sweep {words.sweep}: there is no such file")
    values = read_yaml(file)
    if "name" in words.fields:
        values["name"] = words.fields["name"]
    return split(values, words.sweep)


def _refuse_both(sweep: Sweep, given: Mapping[str, Any]) -> None:
    """A field that is varied and set on the command line."""
    for field in sweep.swept:
        value: Any = given
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            raise ConfigError(
                f"{field} is varied by the sweep and given as --{field}={shown(field, value)}: "
                "leave one of them out"
            )


def _placed(trial: Trial, sweep: str, name: str) -> Trial:
    """In a folder of the sweep's, but in MLflow where other runs are."""
    config = trial.config
    update: dict[str, Any] = {"name": name, "runs": str(Path(config.runs) / sweep)}
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # it may have a password: not into a file
        uri = tracking_uri(config)
        update["tracking"] = config.tracking.model_copy(update={"uri": uri})
    return replace(trial, config=config.model_copy(update=update))


def _check_metric(metric: str, config: Config) -> None:
    """Refuse what the run will not have: found out at the end only, it has cost hours."""
    kind, _, rest = metric.partition("/")
    trained = [r.name for r in config.rewards]
    heldout = [r.name for r in config.evaluation.heldout_rewards]
    if not rest:
        names = [*SUMMARY_WORDS, *trained, *heldout]
        if metric.partition(".")[0] not in names:
            raise ConfigError(
                f"metric is {metric!r}, which is no figure of metrics.jsonl (they begin with "
                f"{'/, '.join(FIGURES)}/) and not in summary.json, which has {', '.join(names)}"
            )
        return
    if kind not in FIGURES:
        raise ConfigError(f"metric is {metric!r}: figures begin with {'/, '.join(FIGURES)}/")
    sets = ["train", "heldout"] if config.prompts.heldout else ["train"]
    known = {
        "reward": ["mean", *trained] if trained else [],
        "heldout": heldout,
        "eval": [
            f"{s}/{n}" for s in sets for n in [*["reward"][: len(trained)], *trained, *heldout]
        ],
    }
    if kind in known and rest not in known[kind]:
        there = ", ".join(f"{kind}/{n}" for n in known[kind]) or f"nothing in {kind}/"
        raise ConfigError(f"metric is {metric!r}, but this run has {there}")
