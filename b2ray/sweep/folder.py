"""The folder of a sweep, runs/SWEEP, which also holds the folders of its trials."""

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
from b2ray.sweep.trials import SweepPlan, Trial
from b2ray.tracking.folder import RunFolder, dump, write_atomically


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep; `open_sweep` makes the object, for one process at a time."""

    path: Path

    @property
    def result(self) -> Path:
        """The file with the comparison of all trials."""
        return self.path / "sweep.json"

    @property
    def spec(self) -> Path:
        """The file with the sweep as it was started, including what the command line set."""
        return self.path / "sweep.yaml"

    def log(self, trial: Trial) -> Path:
        """Return the file with the output of a trial's processes."""
        return self.path / "trials" / f"{trial.name}.txt"

    def write_config(self, trial: Trial, config: Config) -> Path:
        """Write the configuration that a trial's process reads, and return the file."""
        file = self.path / "trials" / f"{trial.name}.yaml"
        write_atomically(file, dump(config))
        return file

    def stopped_early(self) -> dict[str, int]:
        """Return the names of the trials that were stopped early, and after which stage."""
        file = self._stopped
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def stop_early(self, trial: Trial, stage: int) -> None:
        """Note that a trial is stopped early and must not go on."""
        write_atomically(self._stopped, json.dumps({**self.stopped_early(), trial.name: stage}))

    @property
    def _stopped(self) -> Path:
        return self.path / "stopped_early.json"


@contextlib.contextmanager
def open_sweep(plan: SweepPlan) -> Iterator[SweepFolder]:
    """Open the folder of a sweep, locked against other processes; make it if it is new.

    Raises:
        ConfigError: the folder belongs to a run, or is in use by another process.
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
        spec = {**plan.sweep.model_dump(mode="json", exclude_unset=True), **plan.fields}
        write_atomically(folder.spec, yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
        yield folder


def lines(trial: Trial) -> list[dict[str, Any]]:
    """Read the lines of a trial's metrics.jsonl."""
    return RunFolder(trial.path, trial.config).metrics()


def committed(trial: Trial) -> int:
    """Return how many stages a trial has committed."""
    return max(0, RunFolder(trial.path, trial.config).committed)


def finished(trial: Trial) -> bool:
    """Return whether a trial's run has finished."""
    return RunFolder(trial.path, trial.config).finished


def busy(trial: Trial) -> bool:
    """Return whether another process holds the lock of a trial's run.

    After a sweep was killed, the processes of its trials take a while to stop.
    """
    file = trial.path / ".lock"
    if not file.exists():
        return False
    with file.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
