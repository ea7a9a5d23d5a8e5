"""Compares the trials of a sweep: the metric of every trial, and its mean for every setting.

A setting is a combination of the swept values without the seed. Its mean over the seeds comes with
a confidence interval.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from b2ray.config.secrets import shown
from b2ray.evaluation.statistics import mean_interval
from b2ray.sweep.folder import lines
from b2ray.sweep.trials import SweepPlan, Trial
from b2ray.tracking.folder import RunFolder


class State(StrEnum):
    """The state of a trial."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    STOPPED = "stopped"  # by a signal: the same command resumes it
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """The state of a trial, and why it failed, if it did.

    Attributes:
        state: the state.
        cause: the cause of a failure in a sentence.
        log: the file that says more about a failure.
    """

    state: State
    cause: str = ""
    log: str = ""


def figure(trial: Trial, metric: str) -> float | None:
    """Return the metric of a trial, also while it runs.

    Args:
        trial: the trial.
        metric: with a slash, a metric of metrics.jsonl, of which the newest value is returned;
            otherwise a dotted path in summary.json.

    Returns:
        The value; None if there is none yet, or if it is not finite.
    """
    if "/" in metric:
        values = [line[metric] for line in lines(trial) if metric in line]
        return _finite(values[-1]) if values else None
    folder = RunFolder(trial.path, trial.config)
    value: Any = folder.summary() if folder.finished else None
    for part in metric.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return _finite(value)


def _finite(value: Any) -> float | None:
    """Return the value as a float if it is a finite number, else None, which JSON can express."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def comparison(plan: SweepPlan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return the content of sweep.json: every trial, and every setting, beginning with the best.

    Means are over finished trials only. Values that do not exist are None.

    Args:
        plan: the sweep.
        outcomes: the outcome of every trial by its name.
    """
    sweep = plan.sweep
    trials = [_trial(t, outcomes[t.name], sweep.metric) for t in plan.trials]
    # Trials that differ in their seed only have the same setting.
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial, entry in zip(plan.trials, trials, strict=True):
        groups.setdefault(json.dumps(trial.setting, default=str), []).append(entry)
    settings = [_setting(group) for group in groups.values()]
    # The best setting comes first; those without a mean come last.
    sign = -1 if sweep.mode == "max" else 1
    settings.sort(key=lambda s: (s["mean"] is None, sign * (s["mean"] or 0.0)))
    best = settings[0]["values"] if settings[0]["mean"] is not None else None
    head = {"name": sweep.name, "metric": sweep.metric, "mode": sweep.mode}
    return {**head, "best": best, "settings": settings, "trials": trials}


def _trial(trial: Trial, outcome: Outcome, metric: str) -> dict[str, Any]:
    stages = [int(line["step"]) for line in lines(trial)]
    return {
        "name": trial.name,
        "values": dict(trial.values),
        "state": str(outcome.state),
        "stages": max(stages, default=0),
        "figure": figure(trial, metric),
        "folder": str(trial.path),
        "cause": outcome.cause or None,
        "log": outcome.log or None,
    }


def _setting(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entry of a setting in sweep.json, from the entries of its trials."""
    finished = [t for t in trials if t["state"] == State.FINISHED and t["figure"] is not None]
    values = [t["figure"] for t in finished]
    low, high = mean_interval(values) or (None, None)
    return {
        "values": {k: v for k, v in trials[0]["values"].items() if k != "seed"},
        "trials": [t["name"] for t in trials],
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "low": low,
        "high": high,
        "each": values,
    }


def table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table with a row per setting, then the trials that have not finished, and why.

    Args:
        result: what `comparison` returned.
        console: where it is printed; standard output by default.
    """
    console = console or Console()
    console.print(_title(result), markup=False, highlight=False, soft_wrap=True, style="italic")
    console.print(_view(result))
    for line in _unfinished(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def description(result: Mapping[str, Any], longest: int) -> str:
    """Return the table and the unfinished trials in Markdown.

    Args:
        result: what `comparison` returned.
        longest: the most characters; what exceeds them is cut off at the end of a line.
    """
    file = io.StringIO()
    view = _view(result, lambda text: text.replace("|", "\\|"), box=box.MARKDOWN)
    Console(width=1000, file=file, color_system=None).print(view)
    lines = [line.strip() for line in file.getvalue().splitlines()]
    rows = "\n".join(line for line in lines if line)
    text = "\n\n".join([f"{_title(result)}.", rows, *_unfinished(result)])
    if len(text) <= longest:
        return text
    ending = "\n\nThe rest is in sweep.json."
    return text[: longest - len(ending)].rpartition("\n")[0] + ending


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['name']}: {result['metric']}, {result['mode']}imum is best"


def _view(
    result: Mapping[str, Any], cell: Callable[[str], str] = lambda text: text, **style: Any
) -> Table:
    fields = list(result["settings"][0]["values"])
    view = Table(**style)
    for field in fields:
        view.add_column(escape(field), overflow="fold")
    has_seeds = any(len(s["trials"]) > 1 for s in result["settings"])
    columns = ("mean", "95 % interval", "each") if has_seeds else ("figure",)
    for column in (*columns, "finished"):
        view.add_column(column, justify="right")
    for s in result["settings"]:
        mean = "—" if s["mean"] is None else f"{s['mean']:.4g}"
        interval = "—" if s["low"] is None else f"{s['low']:.4g} … {s['high']:.4g}"
        by_seed = " ".join(f"{v:.3g}" for v in s["each"])
        values = [escape(cell(shown(f, s["values"][f]).strip("'"))) for f in fields]
        finished = f"{s['n']} of {len(s['trials'])}"
        row = [*values, mean]
        row += [interval, by_seed, finished] if has_seeds else [finished]
        is_best = s["values"] == result["best"] and len(result["settings"]) > 1
        view.add_row(*row, style="bold" if is_best else None)
    return view


def _unfinished(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about each trial that has not finished."""
    for t in result["trials"]:
        if t["state"] != State.FINISHED:
            state = f"{t['name']}: {t['state']} after {t['stages']} stages"
            value = f", at {t['figure']:.4g}" if t["figure"] is not None else ""
            cause = f": {t['cause']}" if t["cause"] else ""
            log = f" ({t['log']})" if t["log"] else ""
            yield f"{state}{value}{cause}{log}"
