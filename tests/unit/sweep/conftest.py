"""Sweeps of the quickstart, and what their trials would leave on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from b2ray.config.load import read_words
from b2ray.sweep.trials import SweepPlan, Trial, plan
from b2ray.tracking.folder import open_run

BASIC: dict[str, Any] = {
    "name": "rates",
    "config": "configs/quickstart.yaml",
    "metric": "heldout/judge",
    "grid": {"learner.lr": [1e-3, 3e-3], "seed": [0, 1]},
}
Planner = Callable[..., SweepPlan]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Plans a sweep: fields of the file (None leaves one out), then words of the command line."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(*words: str, **fields: object) -> SweepPlan:
        values = {k: v for k, v in {**BASIC, **fields}.items() if v is not None}
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        runs = f"--runs={tmp_path / 'runs'}"
        return plan(read_words([f"--sweep={file}", runs, *words]))

    return make


def write_lines(trial: Trial, *figures: float, summary: object = None) -> None:
    """Lines of metrics.jsonl with these figures of the judge, and a summary if there is one."""
    with open_run(trial.config) as folder:
        for step, figure in enumerate(figures):
            folder.append_metrics(step, {"heldout/judge": figure}, [])
        if summary is not None:
            folder.summary_file.write_text(json.dumps(summary))
