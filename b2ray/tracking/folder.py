"""runs/NAME: what a run writes, and how a stage commits.

A stage commits by a rename: its checkpoint is written beside, flushed, and moved into place. What
was appended for a stage that did not commit is cut off on resume, so a stage that is done again
leaves no trace of its first try.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import safetensors.numpy
import yaml

from b2ray import replay
from b2ray.branching import RewardWindow
from b2ray.config import Config
from b2ray.diffusion import lora_file
from b2ray.diffusion.trajectory import Prefix
from b2ray.errors import ConfigError
from b2ray.options import read_yaml, validated
from b2ray.prefixes import Origin, needed, packed, unpacked

KEPT_CHECKPOINTS = 2
# What a run that ended before its first commit may leave.
LEFTOVERS = ("metrics.jsonl", "mlflow.json", "fleet.jsonl", "system.jsonl")


@dataclass
class RunState:
    """Everything besides weights that decides how a run goes on.

    There is no state of random generators: all randomness is keyed by seed, stage and place.

    Attributes:
        stage: committed stages, which is the next stage's number.
        window: rewards of earlier stages by prompt.
        scores: scores of earlier stages by reward, for rewards with `scale=window`.
        reference: (mean, std) of those rewards at the first evaluation.
        counters: totals by figure name.
        evaluations: figures of each evaluation so far.
        shares: (n, the branches' share of the reward's variance) of each stage so far.
    """

    stage: int = 0
    version: int = 0
    digest: str = ""
    window: RewardWindow = field(default_factory=lambda: RewardWindow(0))
    scores: RewardWindow = field(default_factory=lambda: RewardWindow(0))
    reference: dict[str, tuple[float, float]] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    shares: list[tuple[int, float]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        for name in ("window", "scores"):
            values[name] = RewardWindow(**values[name])
        values["reference"] = {k: tuple(v) for k, v in values["reference"].items()}
        # A run that was begun before there were shares goes on.
        values["shares"] = [(n, share) for n, share in values.get("shares", [])]
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """A committed stage as it was read back; `before` is the LoRA of the one before, if it is
    kept, `kept` what the next one trains on again, and `prefixes` what serves again in it or
    later."""

    state: RunState
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    before: dict[str, np.ndarray] | None
    kept: list[replay.Kept]
    prefixes: dict[Origin, Prefix]


class RunFolder:
    """The folder of one run, held by one process at a time. Made by `open_run`."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.summary_file = path / "summary.json"
        self.metrics_file = path / "metrics.jsonl"
        self.events_file = path / "fleet.jsonl"
        self.system_file = path / "system.jsonl"
        self.pictures = path / "pictures"
        self.lora = path / "lora"
        self._checkpoints = path / "checkpoints"
        self._prefixes = path / "prefixes"

    @property
    def finished(self) -> bool:
        """Whether the run has its summary, which is written last."""
        return self.summary_file.exists()

    @property
    def committed(self) -> int:
        """The newest committed stage, -1 if there is none."""
        return max((int(p.name.split("-")[1]) for p in self._committed()), default=-1)

    def last_commit(self) -> Checkpoint | None:
        """The newest committed stage; cuts off what later, uncommitted tries left behind."""
        stages = self._committed()
        for leftover in self._checkpoints.glob("*.part"):
            shutil.rmtree(leftover)
        self._cut_metrics(self.committed)
        if not stages:
            return None
        folder = stages[-1]
        return Checkpoint(
            RunState.from_json((folder / "state.json").read_text()),
            lora_file.load(folder / lora_file.FILE),
            safetensors.numpy.load_file(folder / "optimizer.safetensors"),
            lora_file.load(stages[-2] / lora_file.FILE) if len(stages) > 1 else None,
            replay.load(folder),
            self._read_prefixes(self.committed),
        )

    def commit(
        self,
        state: RunState,
        weights: lora_file.State,
        optimizer: lora_file.State,
        kept: Sequence[replay.Kept] = (),
        prefixes: Mapping[Origin, Prefix] = MappingProxyType({}),
    ) -> None:
        """Make a stage final, or leave the last one as it is.

        Args:
            state: this stage's and those before it.
            weights: its LoRA.
            optimizer: its optimizer's state.
            kept: what the next stage trains on again, with its arrays.
            prefixes: that this stage made, if they serve again.

        Raises:
            ConfigError: the disk refuses, because it is full, for example.
        """
        final = self._checkpoints / f"stage-{state.stage:05d}"
        part = final.with_suffix(".part")
        try:
            if prefixes:
                self._prefixes.mkdir(exist_ok=True)
                write_atomically(self._prefix_file(state.stage), packed(prefixes))
                _flush(self._prefixes)
            part.mkdir(parents=True, exist_ok=True)
            lora_file.save(part, weights, self.config.model.lora)
            (part / "optimizer.safetensors").write_bytes(safetensors.numpy.save(dict(optimizer)))
            replay.save(part, kept)
            (part / "state.json").write_text(state.to_json())
            for file in (*part.iterdir(), part):
                _flush(file)
            part.rename(final)
            _flush(self._checkpoints)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise ConfigError(
                f"stage {state.stage} could not be committed to {self._checkpoints}: "
                f"{error.strerror}; the stage before it stands, make room and resume"
            ) from error
        for old in self._committed()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        self._forget_prefixes(state.stage)

    def append_metrics(self, step: int, figures: Mapping[str, float], images: list[str]) -> None:
        """Add a stage's line to metrics.jsonl; `images` are files under the run's folder."""
        line = {"step": step, "time": time.time(), "images": images, **figures}
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{self.metrics_file} cannot be written: {error.strerror}") from error

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add a line to fleet.jsonl: what happened to the fleet, over all tries of the run."""
        with contextlib.suppress(OSError), self.events_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def save_trace(self, actor: str, content: bytes) -> None:
        """Keep what an actor was traced doing."""
        folder = self.path / "traces"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{actor}.json.gz", content)

    def save_scores(
        self, step: int, name: str, prompts: list[str], scores: Mapping[str, np.ndarray]
    ) -> None:
        """Keep the scores of each picture of an evaluation of a prompt set."""
        values = {k: [float(v) for v in found] for k, found in scores.items()}
        file = self._scores_file(step, name)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps({"prompts": prompts, "scores": values}))

    def scores(self, step: int, name: str) -> dict[str, np.ndarray]:
        """Scores of each picture of an evaluation, by reward."""
        kept = json.loads(self._scores_file(step, name).read_text(encoding="utf-8"))
        return {k: np.array(v) for k, v in kept["scores"].items()}

    def prompts(self, step: int, name: str) -> list[str]:
        """The prompt of each picture of an evaluation."""
        kept = json.loads(self._scores_file(step, name).read_text(encoding="utf-8"))
        return list(kept["prompts"])

    def evaluated(self, step: int, name: str) -> bool:
        """Whether there is an evaluation of a prompt set after a stage."""
        return self._scores_file(step, name).is_file()

    def strip(self, step: int, name: str) -> Path:
        """The first pictures of an evaluation, side by side (`show.strip`); it may be missing."""
        return self.pictures / f"step-{step:05d}" / f"{name}_strip.png"

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line without its end is being written, or its process died over it.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def summary(self) -> dict[str, Any]:
        """What a finished run says of itself."""
        return dict(json.loads(self.summary_file.read_text()))

    def _committed(self) -> list[Path]:
        return sorted(
            p for p in self._checkpoints.glob("stage-*") if re.fullmatch(r"stage-\d{5}", p.name)
        )

    def _prefix_file(self, step: int) -> Path:
        """Prefixes that the stage of this commit made. They are written once: a checkpoint would
        have them all again."""
        return self._prefixes / f"stage-{step:05d}.safetensors"

    def _read_prefixes(self, step: int) -> dict[Origin, Prefix]:
        """Those that serve after a commit."""
        self._forget_prefixes(step)
        config = self.config
        files = sorted(self._prefixes.glob("stage-*.safetensors"))
        origin = config.prefix.drawn(step)
        if config.prefix.policy == "reuse" and origin < step < config.curriculum.stages:
            file = self._prefix_file(origin + 1)
            if file not in files:
                raise ConfigError(
                    f"{file} is missing: stage {step + 1} goes on from its prefixes, whose weights "
                    "are gone; put it back, or start again under another --name"
                )
        return unpacked(files)

    def _forget_prefixes(self, step: int) -> None:
        """Delete what serves no more after a commit, and what a later, uncommitted try left."""
        for file in self._prefixes.glob("stage-*"):
            made = int(file.name[6:11])
            if file.suffix == ".part" or made > step or not needed(self.config, made - 1, step):
                file.unlink()

    def _scores_file(self, step: int, name: str) -> Path:
        return self.path / "evaluations" / f"step-{step:05d}_{name}.json"

    def _cut_metrics(self, step: int) -> None:
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True):
            # A line that is broken or has no end was being written when the process died.
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= step
            except ValueError:
                keep = False
            if keep:
                kept.append(line)
        write_atomically(self.metrics_file, "".join(kept))


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[RunFolder]:
    """The run's folder, made if it is new.

    Raises:
        ConfigError: it belongs to another configuration or is in use; nothing is changed then.
    """
    path = Path(config.runs) / config.name
    try:
        refuse_foreign(config, path)
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{path} is in use by another process: wait, or end it") from error
        # Again, because another process may have made it a run in the meantime.
        if refuse_foreign(config, path):
            for leftover in map(path.joinpath, LEFTOVERS):
                leftover.unlink(missing_ok=True)
            write_atomically(path / "config.yaml", dump(config))
        yield RunFolder(path, config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write beside, flush, rename."""
    part = file.with_name(file.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    _flush(part)
    part.replace(file)


def refuse_foreign(config: Config, path: Path) -> bool:
    """Refuse a folder that is not this run's; tells whether its configuration is to be written.

    A run that ended before its first commit has nothing to lose: it may be started differently.
    """
    saved = path / "config.yaml"
    if not saved.exists():
        if path.exists() and any(p.name != ".lock" for p in path.iterdir()):
            raise ConfigError(f"{path} exists but is no run of b2ray: choose another --name")
        return True
    theirs = validated(read_yaml(saved)).identity()
    difference = _first_difference(theirs, config.identity())
    if difference and any((path / "checkpoints").glob("stage-*[0-9]")):
        name, was, now = difference
        raise ConfigError(
            f"{path} belongs to another configuration ({name} was {was!r}, is {now!r}): choose "
            "another --name, or resume it with --name and --resume alone"
        )
    return difference is not None


def _first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = (
            _first_difference(a.get(k), b.get(k), f"{name}.{k}".lstrip("."))
            for k in sorted(a.keys() | b.keys())
        )
        return next((d for d in found if d), None)
    return None if a == b else (name, a, b)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
