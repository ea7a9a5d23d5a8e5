"""The trials of the comparison, running them side by side, one core each, and their results.

A finished run leaves a line in `results.jsonl`, from which the report is written; the run's folder
can go then. A line whose settings are no longer the declared ones does not count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from b2ray.tracking.folder import write_atomically

HERE = Path(__file__).parent
DECLARED = yaml.safe_load((HERE / "methods.yaml").read_text(encoding="utf-8"))
METHODS: dict[str, dict[str, Any]] = DECLARED["methods"]
DEFAULT: str = DECLARED["default"]
LATE: dict[str, dict[str, Any]] = DECLARED["late_reward"]  # held against its own first
ABLATIONS: dict[str, dict[str, Any]] = {**DECLARED["ablations"], **LATE}
BASE = HERE / "base.yaml"
RESULTS = HERE / "results.jsonl"
KEPT = ("reward", "judge", "diversity", "seconds")  # of a run's summary


@dataclass(frozen=True)
class Trial:
    """One run of the command: a method, or an ablation of the default, at one setting, with one
    seed."""

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

    @property
    def fields(self) -> dict[str, Any]:
        """What of the configuration is the trial's own."""
        method = DEFAULT if self.method in ABLATIONS else self.method
        own = {**METHODS[method]["fixed"], **dict(self.setting), "seed": self.seed}
        own |= ABLATIONS.get(self.method, {})
        return own | (DECLARED["tuning_fields"] if self.seed in DECLARED["tuning_seeds"] else {})

    def command(self, runs: Path, more: Iterable[str]) -> list[str]:
        """The command line of the run."""
        return [
            *(sys.executable, "-m", "b2ray.run", f"--config={BASE}"),
            *(f"--runs={runs}", f"--name={self.name}"),
            *(f"--{key}={_shown(value)}" for key, value in self.fields.items()),
            *more,
        ]

    def digest(self, more: Iterable[str]) -> str:
        """Tells a result of other settings."""
        settled = [BASE.read_text(encoding="utf-8"), self.fields, list(more)]
        return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:12]

    def result(self, runs: Path, more: Iterable[str]) -> dict[str, Any] | None:
        """What the finished run found; None before."""
        folder = runs / self.name
        if not (folder / "summary.json").exists():
            return None
        summary = json.loads((folder / "summary.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            "name": self.name,
            "digest": self.digest(more),
            "points": [_point(line) for line in lines if "heldout/judge" in line],
            **{key: summary[key] for key in KEPT},
        }


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _point(line: Mapping[str, Any]) -> dict[str, float | None]:
    """An evaluation on fixed seeds, and what it had cost until then."""
    spent = {key: line.get(f"cost/{key}", 0.0) for key in ("reward_queries", "unet_evals")}
    spent["unet_backwards"] = line.get("cost/unet_backwards", 0.0)
    found = {"reward": line["eval/train/reward"], "judge": line["heldout/judge"]}
    # Only a reward that embeds pictures says how much they differ.
    return {**spent, **found, "pairwise": line.get("diversity/pairwise")}


class Results:
    """What finished trials found, by a file that is added to."""

    def __init__(self, file: Path, more: Iterable[str] = ()) -> None:
        self.file, self.more = file, list(more)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self.known = {r["name"]: r for r in map(json.loads, text.splitlines())}
        self._lock = threading.Lock()

    def of(self, trial: Trial) -> dict[str, Any] | None:
        """The result of a trial as it is declared now; None if there is none."""
        found = self.known.get(trial.name)
        return found if found and found["digest"] == trial.digest(self.more) else None

    def take(self, trial: Trial, runs: Path) -> dict[str, Any] | None:
        """The result, also if its run is finished but not in the file yet."""
        found = self.of(trial)
        if found is None and (found := trial.result(runs, self.more)) is not None:
            with self._lock:
                self.known[trial.name] = found
                lines = [json.dumps(r) for _, r in sorted(self.known.items())]
                write_atomically(self.file, "\n".join(lines) + "\n")
        return found


def settings(method: str) -> list[tuple[tuple[str, Any], ...]]:
    """The grid of a method."""
    grid: Mapping[str, list[Any]] = METHODS[method]["grid"]
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuning(method: str) -> list[Trial]:
    """All settings of a method, on the seeds that are not reported."""
    return [Trial(method, s, seed) for s in settings(method) for seed in DECLARED["tuning_seeds"]]


def best(method: str, results: Results) -> tuple[tuple[str, Any], ...] | None:
    """The setting with the highest judged alignment on training captions after the whole budget,
    averaged over the tuning seeds; None while a trial is missing."""
    found: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for trial in tuning(method):
        result = results.of(trial)
        if result is None:
            return None
        found.setdefault(trial.setting, []).append(result["judge"]["train"]["after"])
    return max(found, key=lambda s: sum(found[s]) / len(found[s]))


def reported(method: str, results: Results) -> list[Trial]:
    """The trials of the table, once the method, or the default for an ablation, is tuned."""
    setting = best(DEFAULT if method in ABLATIONS else method, results)
    return [] if setting is None else [Trial(method, setting, s) for s in seeds(method)]


def seeds(method: str) -> list[int]:
    """What a method, or an ablation, is reported on."""
    return [*DECLARED["seeds"], *DECLARED["more_seeds"].get(method, [])]


def run_all(trials: Iterable[Trial], results: Results, runs: Path, jobs: int, what: str) -> None:
    """Run what is not finished, several at a time; an unfinished run is resumed. With no jobs, only
    take in what finished runs found.

    Raises:
        SystemExit: a run failed; its output is named.
    """
    left = [t for t in trials if results.take(t, runs) is None]
    if not left or not jobs:
        return
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(left), desc=what, unit="run") as bar, _ray(jobs) as address:

        def one(trial: Trial) -> None:
            log = runs / "logs" / f"{trial.name}.txt"
            with log.open("w") as output:
                code = subprocess.run(
                    trial.command(runs, results.more),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "RAY_ADDRESS": address},
                ).returncode
            if code or results.take(trial, runs) is None:
                raise SystemExit(f"{trial.name} ended with exit code {code}: {log}")
            bar.update()

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in as_completed([pool.submit(one, t) for t in left]):
                    done.result()
            finally:  # the others would run for an hour before the failure is heard of
                pool.shutdown(cancel_futures=True)


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
