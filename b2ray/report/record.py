"""Reads what the page shows of a run from the run's folder, also while the run goes on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from b2ray.config import Config
from b2ray.tracking.folder import RunFolder

Line = dict[str, Any]
SETS = {"train": "training prompts", "heldout": "unseen prompts"}
PHASES = ("sample", "update", "sync", "evaluate")


@dataclass(frozen=True)
class Change:
    """How a reward changed from the first evaluation to the last, on the same seeds.

    Attributes:
        name: the name of the reward; `reward` is the weighted sum that is trained on.
        prompts: `train` or `heldout`, the prompt set.
        before: the mean at the first evaluation over the pictures that both evaluations have.
        after: the mean at the last evaluation over the same pictures.
        rise: the mean of the paired differences.
        error: the standard error of `rise`, 0 for a single picture.
        count: the number of pictures.
    """

    name: str
    prompts: str
    before: float
    after: float
    rise: float
    error: float
    count: int

    @property
    def direction(self) -> int:
        """1 or -1 if the reward changed by more than two standard errors, else 0."""
        return int(np.sign(self.rise)) if abs(self.rise) > 2 * self.error else 0


@dataclass(frozen=True)
class Record:
    """The content of a run's folder at one moment.

    Attributes:
        folder: the run's folder, for reading only.
        lines: the lines of metrics.jsonl: one from before the first stage, then one per stage.
        events: the lines of fleet.jsonl.
    """

    folder: RunFolder
    lines: list[Line]
    events: list[Line]

    @classmethod
    def read(cls, path: Path, config: Config) -> Record:
        """Read a run's folder; files that are being written are read up to their last newline.

        Args:
            path: the run's folder.
            config: the run's configuration.
        """
        folder = RunFolder(path, config)
        return cls(folder, folder.metrics(), _events(folder.events_file))

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.folder.config

    @property
    def stage(self) -> int:
        """How many stages are done; -1 before the evaluation that precedes the first stage."""
        return int(self.lines[-1]["step"]) if self.lines else -1

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.stage >= self.config.curriculum.stages

    @property
    def by_queries(self) -> bool:
        """Whether plots have reward queries on their x axis; a run without rewards has stages."""
        return bool(self.config.rewards)

    def axis(self, lines: list[Line]) -> np.ndarray:
        """Return the position of each line on the x axis of the plots, float64, shape (N,)."""
        name = "cost/reward_queries" if self.by_queries else "step"
        return np.array([line.get(name, 0.0) for line in lines], np.float64)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where a metric was measured on the x axis, and its values, each of shape (N,)."""
        measured = [line for line in self.lines if name in line]
        return self.axis(measured), np.array([line[name] for line in measured], np.float64)

    def stage_at(self, time: float) -> float:
        """Return the stage at a moment, interpolated between the ends of two stages.

        Args:
            time: seconds since 1970.
        """
        if not self.lines:
            return 0.0
        times = [line["time"] for line in self.lines]
        return float(np.interp(time, times, [line["step"] for line in self.lines]))

    @cached_property
    def evaluated(self) -> dict[str, list[int]]:
        """The stages after which each prompt set was evaluated, in ascending order."""
        stages: dict[str, list[int]] = {}
        for file in sorted((self.folder.path / "evaluations").glob("step-*.json")):
            match = re.fullmatch(r"step-(\d{5,})_(\w+)\.json", file.name)
            if match and match[2] in SETS and int(match[1]) <= self.stage:
                stages.setdefault(match[2], []).append(int(match[1]))
        return {name: sorted(stages[name]) for name in SETS if name in stages}

    @cached_property
    def changes(self) -> list[Change]:
        """How every reward changed on every prompt set, from the first evaluation to the last."""
        changes = []
        for prompts, steps in self.evaluated.items():
            if len(steps) < 2:
                continue
            before, after = (self.folder.scores(s, prompts) for s in (steps[0], steps[-1]))
            changes += [_change(n, prompts, before[n], after[n]) for n in after if n in before]
        names = ["reward", *(r.name for r in self.config.all_rewards)]
        if len(self.config.rewards) == 1 and self.config.rewards[0].weight == 1.0:
            names.remove(self.config.rewards[0].name)  # it is equal to the sum
        order = {name: i for i, name in enumerate(names)}
        return sorted((c for c in changes if c.name in order), key=lambda c: order[c.name])

    def prompts(self, step: int, prompts: str) -> list[str]:
        """Return the prompt of each picture of an evaluation.

        Args:
            step: the number of stages before the evaluation.
            prompts: `train` or `heldout`, the prompt set.
        """
        return self.folder.prompts(step, prompts)


def _change(name: str, prompts: str, before: np.ndarray, after: np.ndarray) -> Change:
    # The shorter evaluation has the first pictures of the longer one.
    n = min(len(before), len(after))
    before, after = before[:n], after[:n]
    rise = after - before
    error = float(rise.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    mean = float(before.mean()), float(after.mean())
    return Change(name, prompts, *mean, float(rise.mean()), error, n)


def _events(file: Path) -> list[Line]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
