"""b2ray itself, as a user starts it: its stages' seconds, and what they say of themselves."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """A run.

    Attributes:
        seconds: of each stage, without its evaluation.
        start: seconds from the command to the first rollout.
        evaluations: that a stage counted, of the UNet.
        figures: the stages' own, the median over them.
    """

    seconds: list[float]
    start: float
    evaluations: float
    figures: dict[str, float]

    @property
    def stage(self) -> float:
        """Seconds of a stage, the median."""
        return statistics.median(self.seconds)


def run(words: Sequence[str], folder: Path, stages: int) -> Ran:
    """Run `stages` stages in an empty folder.

    Raises:
        SystemExit: the command failed; what it wrote stands in the message.
    """
    shutil.rmtree(folder, ignore_errors=True)
    where = (f"--runs={folder.parent}", f"--name={folder.name}")
    command = [sys.executable, "-m", "b2ray.run", *words, *where, f"--curriculum.stages={stages}"]
    began = time.time()
    execute(command, "b2ray.run")
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return read(lines, began)


def execute(command: Sequence[str], what: str, **more: Any) -> str:
    """What a command prints.

    Raises:
        SystemExit: it failed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    env |= more.pop("env", {})
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, **more)
    if done.returncode:
        tail = (done.stderr or done.stdout)[-3000:]
        raise SystemExit(f"{what} ended with exit code {done.returncode}:\n{tail}")
    return done.stdout


def read(lines: Sequence[dict[str, Any]], began: float) -> Ran:
    """A run by its metrics.jsonl.

    Args:
        lines: the first is of before the first stage.
        began: `time.time()` when the command was started.
    """
    seconds = [
        line["time/total"] - before["time/total"] - line.get("time/evaluate", 0.0)
        for before, line in pairwise(lines)
    ]
    counted = [line.get("cost/unet_evals", 0.0) for line in lines]
    first, stages = lines[0], lines[1:]
    names = [
        k for k, v in stages[0].items() if k.startswith(("time/", "memory/")) and v is not None
    ]
    figures = {n: statistics.median(line[n] for line in stages if n in line) for n in names}
    # Costs are totals since the beginning.
    figures |= {
        n: (lines[-1][n] - first.get(n, 0.0)) / len(stages)
        for n in lines[-1]
        if n.startswith("cost/")
    }
    figures["throughput/images_per_second"] = figures["cost/reward_queries"] / statistics.median(
        seconds
    )
    start = first["time"] - first.get("time/evaluate", 0.0) - began
    return Ran(seconds, start, (counted[-1] - counted[0]) / len(stages), figures)
