"""What the page shows of a run, read from its folder alone, also while the run goes on."""

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
    """A reward before and after on the same seeds.

    Attributes:
        name: the reward's; `reward` is the sum that is trained on.
        prompts: `train` or `heldout`, the set.
        before, after: means over the pictures that both evaluations have.
        rise: the mean difference.
        error: the standard error of that, from the differences of the same seeds.
        count: pictures.
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
        """1 or -1 if it changed by more than two standard errors, else 0."""
        return int(np.sign(self.rise)) if abs(self.rise) > 2 * self.error else 0


@dataclass(frozen=True)
class Record:
    """A run's folder as it is now.

    Attributes:
        lines: of metrics.jsonl, before the run, then a stage each.
        events: of fleet.jsonl.
    """

    folder: RunFolder
    lines: list[Line]
    events: list[Line]

    @classmethod
    def read(cls, path: Path, config: Config) -> Record:
        """Read what is there; a file that is being written is read up to its last whole line."""
        folder = RunFolder(path, config)
        return cls(folder, folder.metrics(), _events(folder.events_file))

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.folder.config

    @property
    def stage(self) -> int:
        """Stages that are done; -1: not even the evaluation before the first."""
        return int(self.lines[-1]["step"]) if self.lines else -1

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.stage >= self.config.curriculum.stages

    @property
    def by_queries(self) -> bool:
        """Whether figures are drawn over reward queries; without rewards it is over stages."""
        return bool(self.config.rewards)

    def axis(self, lines: list[Line]) -> np.ndarray:
        """Where stages are on the figures' axis, float64, one for each line."""
        name = "cost/reward_queries" if self.by_queries else "step"
        return np.array([line.get(name, 0.0) for line in lines], np.float64)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(places on the axis, values) of a figure, where it was measured."""
        there = [line for line in self.lines if name in line]
        return self.axis(there), np.array([line[name] for line in there], np.float64)

    def stage_at(self, time: float) -> float:
        """The stage of a moment, between two stages a fraction.

        Args:
            time: seconds since 1970.
        """
        if not self.lines:
            return 0.0
        times = [line["time"] for line in self.lines]
        return float(np.interp(time, times, [line["step"] for line in self.lines]))

    @cached_property
    def evaluated(self) -> dict[str, list[int]]:
        """The stages at which each prompt set was evaluated."""
        found: dict[str, list[int]] = {}
        for file in sorted((self.folder.path / "evaluations").glob("step-*.json")):
            match = re.fullmatch(r"step-(\d{5,})_(\w+)\.json", file.name)
            if match and match[2] in SETS and int(match[1]) <= self.stage:
                found.setdefault(match[2], []).append(int(match[1]))
        return {name: sorted(found[name]) for name in SETS if name in found}

    @cached_property
    def changes(self) -> list[Change]:
        """Every reward on every prompt set, from the first evaluation to the last."""
        found = []
        for prompts, steps in self.evaluated.items():
            if len(steps) < 2:
                continue
            before, after = (self.folder.scores(s, prompts) for s in (steps[0], steps[-1]))
            found += [_change(n, prompts, before[n], after[n]) for n in after if n in before]
        names = ["reward", *(r.name for r in self.config.all_rewards)]
        if len(self.config.rewards) == 1 and self.config.rewards[0].weight == 1.0:
            names.remove(self.config.rewards[0].name)  # the sum says the same
        order = {name: i for i, name in enumerate(names)}
        return sorted((c for c in found if c.name in order), key=lambda c: order[c.name])

    def prompts(self, step: int, prompts: str) -> list[str]:
        """The prompt of each picture of an evaluation."""
        return self.folder.prompts(step, prompts)


def _change(name: str, prompts: str, before: np.ndarray, after: np.ndarray) -> Change:
    n = min(len(before), len(after))  # the first pictures of the longer one are the other's
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
