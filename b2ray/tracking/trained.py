"""Reads the LoRA that a run has trained so far; nothing in the run's folder is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from b2ray.config import Config
from b2ray.config.load import read_yaml, validated
from b2ray.diffusion import lora_file
from b2ray.errors import ConfigError
from b2ray.rewards.combine import Statistics
from b2ray.tracking.folder import RunFolder, RunState


@dataclass(frozen=True)
class Trained:
    """A run's LoRA after `stage` stages.

    Attributes:
        path: the run's folder.
        config: the run's configuration.
        weights: the LoRA as float32 arrays, by diffusers' names.
        stage: how many stages it was trained for.
    """

    path: Path
    config: Config
    weights: lora_file.State
    stage: int

    def __str__(self) -> str:
        return f"{self.config.name}, stage {self.stage} of {self.config.curriculum.stages}"

    def named(self) -> dict[str, Any]:
        """Return which LoRA this is, for the JSON output of commands."""
        return {"run": self.config.name, "folder": str(self.path), "stage": self.stage}


def find_trained(run: str, runs: str, stage: int | None = None) -> Trained:
    """Read a run's LoRA: the final one, else that of the last commit.

    Args:
        run: the run's folder, or its name under `runs`.
        runs: the folder that runs are in.
        stage: reads the LoRA after this stage instead, whose checkpoint must still exist.

    Raises:
        ConfigError: there is no such run or stage, or its files cannot be read.
    """
    path = run_folder(run, runs)
    config = validated(read_yaml(path / "config.yaml"))
    folder, last = RunFolder(path, config), config.curriculum.stages
    file = folder.lora / lora_file.FILE
    if stage in (None, last) and folder.finished and file.is_file():
        return Trained(path, config, _load(file), last)
    checkpoints = path / "checkpoints"
    committed = sorted(int(p.name[6:]) for p in checkpoints.glob("stage-" + "[0-9]" * 5))
    if not committed:
        raise ConfigError(
            f"{path} has no committed stage yet: wait for the first one, or resume the run"
        )
    if stage is not None and stage not in committed:
        numbers = ", ".join(map(str, committed))
        raise ConfigError(f"{path} has no stage {stage}: those that are kept are {numbers}")
    stage = committed[-1] if stage is None else stage
    return Trained(path, config, _load(checkpoints / f"stage-{stage:05d}" / lora_file.FILE), stage)


def reference(path: Path) -> Statistics | None:
    """Read the (mean, std) by which a run's evaluations standardise rewards with `scale=window`.

    Args:
        path: the run's folder.

    Returns:
        The statistics by the name of the reward; None if the run has no checkpoint.

    Raises:
        ConfigError: the newest checkpoint cannot be read.
    """
    files = sorted((path / "checkpoints").glob("stage-" + "[0-9]" * 5 + "/state.json"))
    if not files:
        return None
    try:
        return RunState.from_json(files[-1].read_text(encoding="utf-8")).reference
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{files[-1]} cannot be read: {error!r}") from error


def run_folder(run: str, runs: str) -> Path:
    """Find the folder of a run.

    Args:
        run: the folder itself, or the run's name.
        runs: the folder in which the name is looked up.

    Raises:
        ConfigError: there is no such run.
    """
    candidates = [Path(run).expanduser(), Path(runs).expanduser() / run]
    folder = next((p for p in candidates if (p / "config.yaml").is_file()), None)
    if folder is None:
        names = sorted(p.parent.name for p in candidates[1].parent.glob("*/config.yaml"))
        others = f"; {candidates[1].parent} has {', '.join(names)}" if names else ""
        raise ConfigError(
            f"there is no run {run!r}: neither {candidates[0]} nor {candidates[1]} has a "
            f"config.yaml{others}"
        )
    return folder


def _load(file: Path) -> lora_file.State:
    try:
        return lora_file.load(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
