"""The run's page: one HTML file with everything in it."""

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

ROWS = 200  # of a table, at the most

_drawing = threading.Lock()  # matplotlib's settings are the process's


def page(path: Path, config: Config, live: bool = False) -> str:
    """The page of a run as it is now.

    Args:
        path: the run's folder.
        live: with the few lines by which a page that is served looks for news.

    Raises:
        OSError, ValueError, KeyError: a file of the run's is missing, or broken.
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
    """What changes when there is something new to show."""
    files = (path / name for name in ("metrics.jsonl", "fleet.jsonl", "summary.json"))
    return "-".join(str(f.stat().st_mtime_ns if f.exists() else 0) for f in files)


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("b2ray.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters.update(
        number=words.number,
        signed=words.signed,
        duration=words.duration,
        clock=lambda t: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)),
    )
    found.globals.update(sets=SETS)
    return found


def _facts(record: Record) -> list[tuple[str, str]]:
    """What a person asks first."""
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
    """The figures' numbers: (headings, a row a stage; of many stages some)."""
    own = ("reward/mean", "demonstrations/kl", "interval", "cost/reward_queries")
    measured = sorted({k for line in record.lines for k in line if k.startswith("eval/")})
    more = ("diversity/pairwise", "diversity/vendi", "time/total")
    names = [k for k in (*own, *measured, *more) if any(k in line for line in record.lines)]
    lines = record.lines
    if len(lines) > ROWS:
        lines = [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)]

    def cell(line: dict[str, Any], name: str) -> str:
        return words.number(line[name]) if name in line else ""

    rows = [[str(line["step"]), *(cell(line, n) for n in names)] for line in lines]
    return ["stage", *names], rows


def _totals(record: Record) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of all phases)."""
    found = {name: float(values.sum()) for name, values in plots.phases(record).items()}
    total = sum(found.values())
    return [(name, value, value / total if total else 0.0) for name, value in found.items()]
