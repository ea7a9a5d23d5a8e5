"""Turns a sweep into trials: complete configurations, all checked before the first one starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from b2ray.config import SUMMARY_WORDS, Config
from b2ray.config.load import Words, base, merge, read_yaml, resolved
from b2ray.config.paths import find
from b2ray.config.secrets import shown
from b2ray.errors import ConfigError
from b2ray.preflight import check_files
from b2ray.sweep.spec import Sweep, split
from b2ray.sweep.values import points
from b2ray.tracking.folder import refuse_foreign
from b2ray.tracking.mlflow.names import tracking_uri

# The first parts of the names of metrics in metrics.jsonl.
FIGURES = (
    *("branch", "cost", "demonstrations", "diversity", "eval", "fleet", "heldout", "memory"),
    *("policy", "replay", "reward", "throughput", "time"),
)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: its values of the fields that are varied.
        config: its complete configuration; `config.name` is the name of the trial, and
            `config.runs` the folder of the sweep.
    """

    values: Mapping[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """The name of the trial and of its run."""
        return self.config.name

    @property
    def path(self) -> Path:
        """The folder of the trial's run."""
        return Path(self.config.runs) / self.config.name

    @property
    def setting(self) -> dict[str, Any]:
        """The values without the seed; trials with the same setting are averaged."""
        return {k: v for k, v in self.values.items() if k != "seed"}


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with all its trials.

    Attributes:
        sweep: what is varied and compared.
        fields: the fields of the configuration that the file and the command line set.
        trials: the trials, in the order of the grid.
        folder: the folder of the sweep, runs/NAME.
    """

    sweep: Sweep
    fields: Mapping[str, Any]
    trials: tuple[Trial, ...]
    folder: Path


def plan(words: Words) -> SweepPlan:
    """Read the file of a sweep, and resolve and check the configuration of every trial.

    Args:
        words: the command line, whose fields override those of the file.

    Raises:
        ConfigError: the first thing that is wrong, with the trial, the field and the value.
    """
    sweep, file_fields = _read(words)
    command_fields = {k: v for k, v in words.fields.items() if k != "name"}
    _refuse_both(sweep, command_fields)
    base_values = base(words.config or sweep.config, False, {})
    trials = []
    for point in points(sweep):
        try:
            config = resolved(base_values, file_fields, command_fields, point.nested())
            check_files(config)
            _check_metric(sweep.metric, config)
            trial = _placed(Trial(point.values, config), sweep.name, point.name)
            refuse_foreign(trial.config, trial.path)
        except ConfigError as error:
            raise ConfigError(f"trial {point.name}: {error}") from error
        trials.append(trial)
    fields = merge(file_fields, command_fields)
    return SweepPlan(sweep, fields, tuple(trials), trials[0].path.parent)


def _read(words: Words) -> tuple[Sweep, dict[str, Any]]:
    """Read the file of a sweep; a --name on the command line is the name of the sweep."""
    assert words.sweep is not None
    file = find(words.sweep)
    if file is None or not file.is_file():
        raise ConfigError(f"--sweep {words.sweep}: there is no such file")
    values = read_yaml(file)
    if "name" in words.fields:
        values["name"] = words.fields["name"]
    return split(values, words.sweep)


def _refuse_both(sweep: Sweep, command_fields: Mapping[str, Any]) -> None:
    """Refuse a field that is varied by the sweep and also set on the command line."""
    for field in sweep.swept:
        value: Any = command_fields
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            raise ConfigError(
                f"{field} is varied by the sweep and given as --{field}={shown(field, value)}: "
                "leave one of them out"
            )


def _placed(trial: Trial, sweep: str, name: str) -> Trial:
    """Put a trial into the folder of the sweep; in MLflow it stays where other runs are."""
    config = trial.config
    update: dict[str, Any] = {"name": name, "runs": str(Path(config.runs) / sweep)}
    # A store from the environment may have a password, which must not get into a file.
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        uri = tracking_uri(config)
        update["tracking"] = config.tracking.model_copy(update={"uri": uri})
    return replace(trial, config=config.model_copy(update=update))


def _check_metric(metric: str, config: Config) -> None:
    """Refuse a metric that the run will not have, before hours are spent on it."""
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
        names_of_kind = ", ".join(f"{kind}/{n}" for n in known[kind]) or f"nothing in {kind}/"
        raise ConfigError(f"metric is {metric!r}, but this run has {names_of_kind}")
