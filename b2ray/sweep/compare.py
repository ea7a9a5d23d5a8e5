"""What came of a sweep: a figure for every trial, a mean with its interval for every setting."""

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

from b2ray.confidence import mean_interval
from b2ray.discretion import shown
from b2ray.sweep.folder import lines
from b2ray.sweep.trials import Plan, Trial
from b2ray.tracking.folder import RunFolder


class State(StrEnum):
    """How a trial stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    STOPPED = "stopped"  # to be gone on with
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """How a trial stands, and why if it failed: a sentence, and the file that says more."""

    state: State
    cause: str = ""
    log: str = ""


def figure(trial: Trial, metric: str) -> float | None:
    """The trial's figure as far as it is; None if it has none yet."""
    if "/" in metric:
        values = [line[metric] for line in lines(trial) if metric in line]
        return _finite(values[-1]) if values else None
    folder = RunFolder(trial.path, trial.config)
    value: Any = folder.summary() if folder.finished else None
    for part in metric.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return _finite(value)


def _finite(value: Any) -> float | None:
    """JSON has no other numbers, and a mean of others is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def comparison(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The sweep for programs: every trial, and every setting over its seeds, the best first.

    A mean is of finished trials only. What is not there is null.

    Args:
        outcomes: by the trial's name.
    """
    sweep = plan.sweep
    trials = [_trial(t, outcomes[t.name], sweep.metric) for t in plan.trials]
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial, entry in zip(plan.trials, trials, strict=True):
        groups.setdefault(json.dumps(trial.setting, default=str), []).append(entry)
    settings = [_setting(group) for group in groups.values()]
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
    done = [t for t in trials if t["state"] == State.FINISHED and t["figure"] is not None]
    values = [t["figure"] for t in done]
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


def table(found: Mapping[str, Any], console: Console | None = None) -> None:
    """The closing table: a row a setting, then what did not finish and why."""
    console = console or Console()
    console.print(_title(found), markup=False, highlight=False, soft_wrap=True, style="italic")
    console.print(_view(found))
    for line in _unfinished(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def description(found: Mapping[str, Any], longest: int) -> str:
    """The same in Markdown, cut off at a line's end if it has more than `longest` characters."""
    file = io.StringIO()
    view = _view(found, lambda text: text.replace("|", "\\|"), box=box.MARKDOWN)
    Console(width=1000, file=file, color_system=None).print(view)
    lines = [line.strip() for line in file.getvalue().splitlines()]
    rows = "\n".join(line for line in lines if line)
    text = "\n\n".join([f"{_title(found)}.", rows, *_unfinished(found)])
    if len(text) <= longest:
        return text
    rest = "\n\nThe rest is in sweep.json."
    return text[: longest - len(rest)].rpartition("\n")[0] + rest


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['name']}: {found['metric']}, {found['mode']}imum is best"


def _view(
    found: Mapping[str, Any], cell: Callable[[str], str] = lambda text: text, **style: Any
) -> Table:
    fields = list(found["settings"][0]["values"])
    view = Table(**style)
    for field in fields:
        view.add_column(escape(field), overflow="fold")
    several = any(len(s["trials"]) > 1 for s in found["settings"])
    columns = ("mean", "95 % interval", "each") if several else ("figure",)
    for column in (*columns, "finished"):
        view.add_column(column, justify="right")
    for s in found["settings"]:
        mean = "—" if s["mean"] is None else f"{s['mean']:.4g}"
        within = "—" if s["low"] is None else f"{s['low']:.4g} … {s['high']:.4g}"
        each = " ".join(f"{v:.3g}" for v in s["each"])
        values = [escape(cell(shown(f, s["values"][f]).strip("'"))) for f in fields]
        done = f"{s['n']} of {len(s['trials'])}"
        best = "bold" if s["values"] == found["best"] and len(found["settings"]) > 1 else None
        row = [*values, mean, within, each, done] if several else [*values, mean, done]
        view.add_row(*row, style=best)
    return view


def _unfinished(found: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each trial that has not finished."""
    for t in found["trials"]:
        if t["state"] != State.FINISHED:
            said = f"{t['name']}: {t['state']} after {t['stages']} stages"
            had = f", at {t['figure']:.4g}" if t["figure"] is not None else ""
            why = f": {t['cause']}" if t["cause"] else ""
            more = f" ({t['log']})" if t["log"] else ""
            yield f"{said}{had}{why}{more}"
