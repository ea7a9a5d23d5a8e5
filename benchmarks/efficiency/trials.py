"""The trials of the comparison, and running them side by side, one core each."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

HERE = Path(__file__).parent
DECLARED = yaml.safe_load((HERE / "methods.yaml").read_text(encoding="utf-8"))
METHODS: dict[str, dict[str, Any]] = DECLARED["methods"]


@dataclass(frozen=True)
class Trial:
    """One run of the command: a method at one setting, with one seed."""

    method: str
    setting: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        """A folder's name: the method and what was tuned, then the seed."""
        words = [self.method, *(f"{key.split('.')[-1]}={value:g}" for key, value in self.setting)]
        plain = "".join(
            c if c.isascii() and (c.isalnum() or c in ".-=") else "-"
            for c in "_".join(words).replace("²", "2").replace("_", "-")
        )
        return f"{plain.replace('=', '')}-s{self.seed}"

    def command(self, runs: Path, more: Iterable[str]) -> list[str]:
        """The command line of the run."""
        fields = {**METHODS[self.method]["fixed"], **dict(self.setting)}
        if self.seed in DECLARED["tuning_seeds"]:
            fields |= DECLARED["tuning_fields"]
        preset = fields.pop("preset")
        return [
            *(sys.executable, "-m", "b2ray.run", f"--config={HERE / 'base.yaml'}"),
            *(f"--preset={preset}", f"--runs={runs}", f"--name={self.name}", f"--seed={self.seed}"),
            *(f"--{key}={value}" for key, value in fields.items()),
            *more,
        ]

    def summary(self, runs: Path) -> dict[str, Any] | None:
        """What the finished run says of itself; None before."""
        file = runs / self.name / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def lines(self, runs: Path) -> list[dict[str, Any]]:
        """Its figures, stage by stage."""
        text = (runs / self.name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


def settings(method: str) -> list[tuple[tuple[str, Any], ...]]:
    """The grid of a method."""
    grid: Mapping[str, list[Any]] = METHODS[method]["grid"]
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuning(method: str) -> list[Trial]:
    """All settings of a method, on the seeds that are not reported."""
    return [Trial(method, s, seed) for s in settings(method) for seed in DECLARED["tuning_seeds"]]


def best(method: str, runs: Path) -> tuple[tuple[str, Any], ...] | None:
    """The setting with the highest judged alignment on training captions after the whole budget,
    averaged over the tuning seeds; None while a trial is missing."""
    found: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for trial in tuning(method):
        summary = trial.summary(runs)
        if summary is None:
            return None
        found.setdefault(trial.setting, []).append(summary["judge"]["train"]["after"])
    return max(found, key=lambda s: sum(found[s]) / len(found[s]))


def reported(method: str, runs: Path) -> list[Trial]:
    """The trials of the table, once the method is tuned."""
    setting = best(method, runs)
    return [] if setting is None else [Trial(method, setting, s) for s in DECLARED["seeds"]]


def run_all(trials: Iterable[Trial], runs: Path, jobs: int, more: list[str], what: str) -> None:
    """Run what is not finished, several at a time; an unfinished run is resumed.

    Raises:
        SystemExit: a run failed; its output is named.
    """
    left = [t for t in trials if t.summary(runs) is None]
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(left), desc=what, unit="run") as bar, _ray(jobs) as address:
        failed = threading.Event()

        def one(trial: Trial) -> None:
            if failed.is_set():
                return
            log = runs / "logs" / f"{trial.name}.txt"
            with log.open("w") as output:
                code = subprocess.run(
                    trial.command(runs, more),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "RAY_ADDRESS": address},
                ).returncode
            if code:
                failed.set()
                raise SystemExit(f"{trial.name} ended with exit code {code}: {log}")
            bar.update()

        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(one, t) for t in left]:
                done.result()


@contextmanager
def _ray(jobs: int) -> Iterator[str]:
    """One Ray for all runs, so that each starts in seconds."""
    import ray

    ray.init(
        address="local",
        num_cpus=jobs,
        include_dashboard=False,
        object_store_memory=500 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
