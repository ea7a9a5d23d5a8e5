"""Makes the page of a run: one HTML file that needs no other files."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import b2ray
from b2ray.config import Config
from b2ray.report import images, plots, words
from b2ray.report.record import SETS, Record
from b2ray.tracking.folder import dump

ROWS = 200  # the most rows of a table

_drawing = threading.Lock()  # held while drawing: matplotlib's settings are those of the process


def page(path: Path, config: Config, live: bool = False) -> str:
    """Make the page of a run as it is now.

    Args:
        path: the run's folder.
        config: the run's configuration.
        live: whether the page reloads itself when the run has something new; `b2ray watch` serves
            such a page.

    Returns:
        The page as HTML.

    Raises:
        OSError: a file of the run is missing.
        ValueError, KeyError: a file of the run is broken.
    """
    record = Record.read(path, config)
    with _drawing:
        figures = {
            "progress": plots.progress(record) if record.lines else None,
            "diversity": plots.diversity(record),
            "seconds": plots.seconds(record),
        }
    template = _environment().get_template("page.html.j2")
    return template.render(
        record=record,
        config=config,
        configuration=dump(config),
        verdict=words.verdict(record),
        warning=words.warning(record),
        command=words.command(record),
        facts=_facts(record),
        figures=figures,
        compared=images.compared(record),
        branched=images.branched(record),
        table=_table(record),
        totals=_totals(record),
        events=record.events[-ROWS:],
        version=b2ray.__version__,
        live=live,
        stamp=stamp(path),
    )


def stamp(path: Path) -> str:
    """Return a text that changes when the files of a run change."""
    files = (path / name for name in ("metrics.jsonl", "fleet.jsonl", "summary.json"))
    return "-".join(str(f.stat().st_mtime_ns if f.exists() else 0) for f in files)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("b2ray.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        number=words.number,
        signed=words.signed,
        duration=words.duration,
        clock=lambda t: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)),
    )
    environment.globals.update(sets=SETS)
    return environment


def _facts(record: Record) -> list[tuple[str, str]]:
    """Return the most important facts about the run, as (label, text)."""
    config = record.config
    last = record.lines[-1] if record.lines else {}
    start, end = config.interval_bounds
    interval = f"{start}" if start == end else f"{start} → {end}"
    return [
        ("stages", f"{max(0, record.stage)} of {config.curriculum.stages}"),
        ("reward queries", f"{last.get('cost/reward_queries', 0):,.0f}"),
        ("UNet evaluations", f"{last.get('cost/unet_evals', 0):,.0f}"),
        ("time", words.duration(last.get("time/total", 0.0))),
        ("preset", config.preset),
        ("model", config.model.path),
        ("interval", f"{interval} of {config.sampling.steps} steps"),
        ("pictures a stage", f"{config.branching.images}, {config.branching.branches} a group"),
        ("seed", str(config.seed)),
    ]


def _table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Return the metrics as (headings, rows): one row per stage, or `ROWS` evenly spaced stages."""
    of_training = ("reward/mean", "demonstrations/kl", "interval", "cost/reward_queries")
    measured = sorted({k for line in record.lines for k in line if k.startswith("eval/")})
    more = ("diversity/pairwise", "diversity/vendi", "time/total")
    names = [k for k in (*of_training, *measured, *more) if any(k in line for line in record.lines)]
    lines = record.lines
    if len(lines) > ROWS:
        lines = [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)]

    def cell(line: dict[str, Any], name: str) -> str:
        return words.number(line[name]) if name in line else ""

    rows = [[str(line["step"]), *(cell(line, n) for n in names)] for line in lines]
    return ["stage", *names], rows


def _totals(record: Record) -> list[tuple[str, float, float]]:
    """Return (phase, seconds, share of all phases) for the whole run."""
    totals = {name: float(values.sum()) for name, values in plots.phases(record).items()}
    total = sum(totals.values())
    return [(name, value, value / total if total else 0.0) for name, value in totals.items()]
