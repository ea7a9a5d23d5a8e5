"""The folder of a run, runs/NAME: the files in it, and how a stage is committed.

A stage is committed by a rename: its checkpoint is written under another name, flushed to disk, and
then renamed. When a run resumes, the lines that were appended for a stage without a commit are
removed, so that a stage that is repeated leaves no trace of its first try.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.numpy
import yaml

from b2ray.algorithm import replay
from b2ray.algorithm.branching import RewardWindow
from b2ray.config import Config
from b2ray.config.load import read_yaml, validated
from b2ray.diffusion import lora_file
from b2ray.errors import ConfigError

KEPT_CHECKPOINTS = 2
# Files that a run which ended before its first commit may have left behind.
LEFTOVERS = ("metrics.jsonl", "mlflow.json", "fleet.jsonl", "system.jsonl")


@dataclass(frozen=True)
class RunState:
    """Everything apart from the weights and the optimizer that the next stages depend on.

    It holds no state of random generators, because every random number is a function of the seed,
    the stage and the position within the stage.

    Attributes:
        stage: how many stages are committed, which is also the number of the next stage.
        version: the version of the policy after these stages.
        digest: the digest of that policy's LoRA; empty before the first commit.
        window: the rewards of earlier stages by prompt.
        scores: the scores of earlier stages by reward, for rewards with `scale=window`.
        reference: (mean, std) of the scores of those rewards at the first evaluation.
        counters: totals over all stages, by the name of the metric.
        evaluations: the metrics of each evaluation so far.
        shares: for each stage so far, the interval n and the share of the reward's variance that
            lies between the branches of one prefix.
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

    @classmethod
    def new(cls, window: int) -> Self:
        """Return the state before the first stage; `window` is the length of its reward windows."""
        return cls(window=RewardWindow(window), scores=RewardWindow(window))

    def after_stage(self, costs: Mapping[str, float]) -> Self:
        """Return the state one stage later, with the stage's costs added to the counters."""
        totals = {name: self.counters.get(name, 0.0) + cost for name, cost in costs.items()}
        return replace(self, stage=self.stage + 1, counters={**self.counters, **totals})

    def to_json(self) -> str:
        """Return the state as the text of state.json."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of state.json; raise ValueError, KeyError or TypeError if it is broken."""
        values = json.loads(text)
        for name in ("window", "scores"):
            values[name] = RewardWindow(**values[name])
        values["reference"] = {k: tuple(v) for k, v in values["reference"].items()}
        # Runs of earlier versions of b2ray have no shares, and can still be resumed.
        values["shares"] = [(n, share) for n, share in values.get("shares", [])]
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """A committed stage, read back from disk.

    Attributes:
        state: the run's state after the stage.
        weights: the LoRA after the stage.
        optimizer: the state of the optimizer after the stage.
        before: the LoRA of the stage before; None if that checkpoint does not exist.
        replay: the entries that the next stage replays, with their arrays.
    """

    state: RunState
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    before: dict[str, np.ndarray] | None
    replay: list[replay.ReplayEntry]


class RunFolder:
    """The folder of one run.

    The run itself writes to it: `open_run` makes the object and holds a lock, so that only one
    process at a time calls `last_commit`, `commit`, `append_*` and `save_*`. Everything else
    (reports, sweeps, `b2ray sample`) makes the object itself and only reads, which needs no lock
    and works while the run goes on: files appear by a rename, and a last line of metrics.jsonl
    that is not complete is skipped.

    Args:
        path: the folder.
        config: the run's configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.summary_file = path / "summary.json"
        self.metrics_file = path / "metrics.jsonl"
        self.events_file = path / "fleet.jsonl"
        self.system_file = path / "system.jsonl"
        self.pictures = path / "pictures"
        self.lora = path / "lora"
        self._checkpoints = path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has finished, which its summary shows, because it is written last."""
        return self.summary_file.exists()

    @property
    def committed(self) -> int:
        """The number of the newest committed stage; -1 if there is none."""
        return max((int(p.name.split("-")[1]) for p in self._committed()), default=-1)

    def last_commit(self) -> Checkpoint | None:
        """Read the newest committed stage, if any, and remove what later tries did not commit."""
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
        )

    def commit(
        self,
        state: RunState,
        weights: lora_file.State,
        optimizer: lora_file.State,
        entries: Sequence[replay.ReplayEntry] = (),
    ) -> None:
        """Write the checkpoint of a stage; if that fails, the one before it stays the newest.

        Args:
            state: the run's state after the stage.
            weights: the LoRA after the stage.
            optimizer: the state of the optimizer after the stage.
            entries: the entries that the next stage replays, with the arrays of trajectories.

        Raises:
            ConfigError: the checkpoint cannot be written, for example because the disk is full.
        """
        final = self._checkpoints / f"stage-{state.stage:05d}"
        part = final.with_suffix(".part")
        try:
            # Write everything under another name.
            part.mkdir(parents=True, exist_ok=True)
            lora_file.save(part, weights, self.config.model.lora)
            (part / "optimizer.safetensors").write_bytes(safetensors.numpy.save(dict(optimizer)))
            replay.save(part, entries)
            (part / "state.json").write_text(state.to_json())
            # The rename must not reach the disk before the contents.
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

    def append_metrics(self, step: int, figures: Mapping[str, float], images: list[str]) -> None:
        """Add the line of a stage to metrics.jsonl; `images` are paths under the run's folder.

        Raises:
            ConfigError: the file cannot be written.
        """
        line = {"step": step, "time": time.time(), "images": images, **figures}
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{self.metrics_file} cannot be written: {error.strerror}") from error

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add an event of the workers to fleet.jsonl; if the disk refuses, the event is lost."""
        with contextlib.suppress(OSError), self.events_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def save_trace(self, actor: str, content: bytes) -> None:
        """Write the trace of an actor, which is gzipped JSON, into traces/."""
        folder = self.path / "traces"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{actor}.json.gz", content)

    def save_scores(
        self, step: int, name: str, prompts: list[str], scores: Mapping[str, np.ndarray]
    ) -> None:
        """Write the scores of an evaluation on one prompt set.

        Args:
            step: the number of stages before the evaluation.
            name: the name of the prompt set, such as `train`.
            prompts: the prompt of each of N pictures.
            scores: the scores of the pictures by reward, each of shape (N,).
        """
        values = {k: [float(v) for v in column] for k, column in scores.items()}
        file = self._scores_file(step, name)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps({"prompts": prompts, "scores": values}))

    def scores(self, step: int, name: str) -> dict[str, np.ndarray]:
        """Return the score of each picture of an evaluation, by reward, as arrays of shape (N,)."""
        evaluation = json.loads(self._scores_file(step, name).read_text(encoding="utf-8"))
        return {k: np.array(v) for k, v in evaluation["scores"].items()}

    def prompts(self, step: int, name: str) -> list[str]:
        """Return the prompt of each picture of an evaluation."""
        evaluation = json.loads(self._scores_file(step, name).read_text(encoding="utf-8"))
        return list(evaluation["prompts"])

    def evaluated(self, step: int, name: str) -> bool:
        """Return whether a prompt set was evaluated after this number of stages."""
        return self._scores_file(step, name).is_file()

    def strip(self, step: int, name: str) -> Path:
        """Return where the first pictures of an evaluation are (`show.strip`), if they exist."""
        return self.pictures / f"step-{step:05d}" / f"{name}_strip.png"

    def metrics(self) -> list[dict[str, Any]]:
        """Read all complete lines of metrics.jsonl."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line without a newline is still being written, or its process died while writing it.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def summary(self) -> dict[str, Any]:
        """Read summary.json, which only a finished run has."""
        return dict(json.loads(self.summary_file.read_text()))

    def _committed(self) -> list[Path]:
        return sorted(
            p for p in self._checkpoints.glob("stage-*") if re.fullmatch(r"stage-\d{5}", p.name)
        )

    def _scores_file(self, step: int, name: str) -> Path:
        return self.path / "evaluations" / f"step-{step:05d}_{name}.json"

    def _cut_metrics(self, step: int) -> None:
        if not self.metrics_file.exists():
            return
        committed_lines = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True):
            # A broken line, or one without a newline, was being written when the process died.
            try:
                is_committed = line.endswith("\n") and json.loads(line)["step"] <= step
            except ValueError:
                is_committed = False
            if is_committed:
                committed_lines.append(line)
        write_atomically(self.metrics_file, "".join(committed_lines))


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[RunFolder]:
    """Open the folder of a run for writing, locked against other processes; make it if it is new.

    Raises:
        ConfigError: the folder belongs to another configuration, is in use by another process, or
            cannot be written; nothing is changed then.
    """
    path = Path(config.runs) / config.name
    try:
        refuse_foreign(config, path)
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    with lock:  # closing the file releases the lock, also when the process dies
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{path} is in use by another process: wait, or end it") from error
        # Check again: another process may have started a run here before this one had the lock.
        if refuse_foreign(config, path):
            for leftover in map(path.joinpath, LEFTOVERS):
                leftover.unlink(missing_ok=True)
            write_atomically(path / "config.yaml", dump(config))
        yield RunFolder(path, config)


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one.

    The content goes into a second file, which is flushed to disk and then renamed.

    Raises:
        OSError: the disk refuses.
    """
    part = file.with_name(file.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    _flush(part)
    part.replace(file)


def refuse_foreign(config: Config, path: Path) -> bool:
    """Refuse a folder that belongs to something else than a run with this configuration.

    A run that ended before its first commit has nothing to lose, and may be started again with
    another configuration.

    Returns:
        Whether the configuration has still to be written into the folder.

    Raises:
        ConfigError: the folder is no run, or a run of another configuration with a commit.
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
    """Return the dotted name of the first field that differs, with its value in `a` and in `b`."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        differences = (
            _first_difference(a.get(k), b.get(k), f"{name}.{k}".lstrip("."))
            for k in sorted(a.keys() | b.keys())
        )
        return next((d for d in differences if d), None)
    return None if a == b else (name, a, b)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
