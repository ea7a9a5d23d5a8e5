"""The tables of docs/evidence/performance.md."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.tables import markdown

Found = Sequence[Mapping[str, Any]]  # what was measured, in order
NAMES = {
    "floor": "floor",
    "b2ray": "b2ray",
    "released": "the released schedule",
    "peer": "trl's DDPOTrainer",
}
PHASES = ("sample", "select", "update", "sync", "commit")


def save(file: Path, found: Found) -> None:
    """Keep what was measured."""
    file.write_text(json.dumps(list(found), indent=1), encoding="utf-8")


def spread(values: Sequence[float], form: str) -> str:
    """Median, and least and most if there are several."""
    middle = form.format(statistics.median(values))
    if len(values) < 2:
        return middle
    return f"{middle} ({form.format(min(values))} – {form.format(max(values))})"


def over(found: Found, workload: str, who: str, base: str) -> list[float]:
    """Seconds of one over those of another, in each repetition."""
    seconds = {
        (m["who"], m["repetition"]): m["seconds"] for m in found if m["workload"] == workload
    }
    return [s / seconds[base, r] for (w, r), s in seconds.items() if w == who]


def speed(found: Found) -> str:
    """A line for everybody on every workload."""
    rows = []
    for workload in dict.fromkeys(m["workload"] for m in found):
        for who in dict.fromkeys(m["who"] for m in found if m["workload"] == workload):
            mine = [m for m in found if m["workload"] == workload and m["who"] == who]
            ratio = over(found, workload, who, "floor")
            faster = over(found, workload, who, "b2ray")
            rows.append(
                [
                    workload,
                    NAMES[who],
                    spread([m["seconds"] for m in mine], "{:.1f}"),
                    spread([m["images"] / m["seconds"] for m in mine], "{:.1f}"),
                    "1" if who == "floor" else spread(ratio, "{:.2f}"),
                    "1" if who == "b2ray" else spread(faster, "{:.2f}"),
                ]
            )
    heads = ["workload", "", "seconds a stage", "images a second", "time / floor", "time / b2ray"]
    return markdown(heads, rows)


def phases(found: Found) -> str:
    """Where b2ray's stages spent their time, medians over the repetitions."""
    runs = [m for m in found if m["who"] == "b2ray"]
    names = list(dict.fromkeys(m["workload"] for m in runs))

    def cells(value: Any, form: str) -> list[str]:
        return [
            form.format(statistics.median(value(m) for m in runs if m["workload"] == name))
            for name in names
        ]

    def figure(name: str, scale: float = 1.0) -> Any:
        return lambda m: m["figures"].get(name, 0.0) / scale

    def rest(m: Mapping[str, Any]) -> float:
        return float(m["seconds"]) - sum(m["figures"].get(f"time/{p}", 0.0) for p in PHASES)

    rows = [[f"`time/{p}`", *cells(figure(f"time/{p}"), "{:.2f} s")] for p in PHASES]
    rows.append(["the rest of a stage", *cells(rest, "{:.2f} s")])
    floors = {m["workload"]: m["parts"] for m in found if m["who"] == "floor"}
    for part in next(iter(floors.values())):
        rows.append([f"floor: {part}", *(f"{floors[name][part]:.2f} s" for name in names)])
    for role in ("sampler", "learner"):
        name = f"time/unet_share_{role}"
        rows.append([f"`{name}`", *cells(figure(name, 0.01), "{:.0f} %")])
    for kind in ("prefixes", "pictures", "trajectories", "learnt", "weights"):
        name = f"cost/bytes_{kind}"
        rows.append([f"`{name}`", *cells(figure(name, 2**20), "{:.2f} MiB")])
    for role in ("learner", "sampler", "scorer"):
        name = f"memory/{role}"
        rows.append([f"`{name}`", *cells(figure(name), "{:.2f} GiB")])
    rows.append(["command to first rollout", *cells(lambda m: m["start"], "{:.1f} s")])
    return markdown(["", *names], rows)


def machine(given: argparse.Namespace) -> str:
    """What it was measured on."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{_processor()}, {given.cores} cores used, {memory:.0f} GiB, torch {version('torch')}, "
        f"{given.repetitions} repetitions of {given.stages} stages: median (least – most)."
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux has more to say than Python
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
