"""runs/SWEEP: what a sweep keeps beside the folders of its trials."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from b2ray.config import Config
from b2ray.errors import ConfigError
from b2ray.sweep.trials import Plan, Trial
from b2ray.tracking.folder import RunFolder, dump, write_atomically


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep, held by one process at a time. Made by `open_sweep`."""

    path: Path

    @property
    def result(self) -> Path:
        """The comparison, for programs."""
        return self.path / "sweep.json"

    @property
    def spec(self) -> Path:
        """The sweep's file, with what the command line gave over it."""
        return self.path / "sweep.yaml"

    def log(self, trial: Trial) -> Path:
        """What the trial's processes said."""
        return self.path / "trials" / f"{trial.name}.txt"

    def write_config(self, trial: Trial, config: Config) -> Path:
        """The trial's configuration as its process is to read it; returns the file."""
        file = self.path / "trials" / f"{trial.name}.yaml"
        write_atomically(file, dump(config))
        return file

    def stopped_early(self) -> dict[str, int]:
        """The trials that were stopped because they did badly, and after which stage."""
        file = self._stopped
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def stop_early(self, trial: Trial, stage: int) -> None:
        """Note that a trial is not to go on."""
        write_atomically(self._stopped, json.dumps({**self.stopped_early(), trial.name: stage}))

    @property
    def _stopped(self) -> Path:
        return self.path / "stopped_early.json"


@contextlib.contextmanager
def open_sweep(plan: Plan) -> Iterator[SweepFolder]:
    """The sweep's folder, made if it is new.

    Raises:
        ConfigError: it is a run's, or in use.
    """
    path = plan.folder
    if (path / "config.yaml").exists():
        raise ConfigError(f"{path} is the folder of a run: give the sweep another name")
    (path / "trials").mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{path} is in use by another sweep: wait, or end it") from error
        folder = SweepFolder(path)
        asked = {**plan.sweep.model_dump(mode="json", exclude_unset=True), **plan.fields}
        write_atomically(folder.spec, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))
        yield folder


def lines(trial: Trial) -> list[dict[str, Any]]:
    """The lines of a trial's metrics.jsonl."""
    return RunFolder(trial.path, trial.config).metrics()


def committed(trial: Trial) -> int:
    """The stages that a trial has for good."""
    return max(0, RunFolder(trial.path, trial.config).committed)


def finished(trial: Trial) -> bool:
    """Whether a trial's run has its summary."""
    return RunFolder(trial.path, trial.config).finished


def busy(trial: Trial) -> bool:
    """Whether another process is at the trial's run: one that a killed sweep left and that is about
    to stop."""
    file = trial.path / ".lock"
    if not file.exists():
        return False
    with file.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
