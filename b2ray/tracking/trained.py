"""The LoRA that a run has so far, for reading: nothing in the run's folder is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from b2ray.config import Config
from b2ray.diffusion import lora_file
from b2ray.errors import ConfigError
from b2ray.options import read_yaml, validated
from b2ray.rewards.combine import Statistics
from b2ray.tracking.folder import RunFolder, RunState


@dataclass(frozen=True)
class Trained:
    """A run's LoRA after `stage` stages.

    Attributes:
        path: the run's folder.
        weights: float32 arrays under diffusers' names.
    """

    path: Path
    config: Config
    weights: lora_file.State
    stage: int

    def __str__(self) -> str:
        return f"{self.config.name}, stage {self.stage} of {self.config.curriculum.stages}"

    def named(self) -> dict[str, Any]:
        """Which it is, for programs."""
        return {"run": self.config.name, "folder": str(self.path), "stage": self.stage}


def find_trained(run: str, runs: str, stage: int | None = None) -> Trained:
    """Read the finished LoRA of a run, or that of its last commit, or of a stage that is kept.

    Args:
        run: the run's folder, or its name under `runs`.

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
    kept = sorted(int(p.name[6:]) for p in checkpoints.glob("stage-" + "[0-9]" * 5))
    if not kept:
        raise ConfigError(
            f"{path} has no committed stage yet: wait for the first one, or resume the run"
        )
    if stage is not None and stage not in kept:
        numbers = ", ".join(map(str, kept))
        raise ConfigError(f"{path} has no stage {stage}: those that are kept are {numbers}")
    stage = kept[-1] if stage is None else stage
    return Trained(path, config, _load(checkpoints / f"stage-{stage:05d}" / lora_file.FILE), stage)


def reference(path: Path) -> Statistics | None:
    """(mean, std) by which a run's evaluations standardise rewards with `scale=window`.

    None if no commit of the run is kept that says it.
    """
    files = sorted((path / "checkpoints").glob("stage-" + "[0-9]" * 5 + "/state.json"))
    if not files:
        return None
    try:
        return RunState.from_json(files[-1].read_text(encoding="utf-8")).reference
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{files[-1]} cannot be read: {error!r}") from error


def run_folder(run: str, runs: str) -> Path:
    """The folder of a run that is given by its folder, or by its name under `runs`.

    Raises:
        ConfigError: there is none.
    """
    places = [Path(run).expanduser(), Path(runs).expanduser() / run]
    found = next((p for p in places if (p / "config.yaml").is_file()), None)
    if found is None:
        there = sorted(p.parent.name for p in places[1].parent.glob("*/config.yaml"))
        names = f"; {places[1].parent} has {', '.join(there)}" if there else ""
        raise ConfigError(
            f"there is no run {run!r}: neither {places[0]} nor {places[1]} has a config.yaml{names}"
        )
    return found


def _load(file: Path) -> lora_file.State:
    try:
        return lora_file.load(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
