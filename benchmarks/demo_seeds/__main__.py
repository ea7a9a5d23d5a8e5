"""The quickstart with several seeds: the laptop tutorial's table, with time and peak memory.

    python -m benchmarks.demo_seeds [--seeds 0 1 2] [--runs runs/seeds] [-- --section.field=value …]

Memory is the sum over all processes of the run (driver, Ray, actors) of their proportional set
sizes, sampled twice a second; shared pages are counted once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

SAMPLE_EVERY = 0.5  # seconds


def main() -> None:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_seeds", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("more", nargs="*", help="further fields, after --")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        name = f"seed{seed}"
        command = [sys.executable, "-m", "b2ray.run", f"--runs={arguments.runs}", f"--name={name}"]
        began = time.perf_counter()
        peak = watched([*command, f"--seed={seed}", *arguments.more])
        wall = time.perf_counter() - began
        summary = json.loads((arguments.runs / name / "summary.json").read_text())
        rows.append(row(summary, wall, peak))
    print(HEAD)
    print("\n".join(rows))


HEAD = """\
| seed | reward | judged, training captions | judged, unseen captions | diversity (Vendi) \
| reward queries | UNet evaluations | training | whole command | peak memory |
|---|---|---|---|---|---|---|---|---|---|"""


def row(summary: dict, wall: float, peak: int) -> str:
    """One line of the table."""
    judge, vendi = summary["judge"], summary["diversity"]["vendi"]
    cells = [
        str(summary["seed"]),
        "{before:.3f} → {after:.3f}".format(**summary["reward"]),
        "{before:.1%} → {after:.1%}".format(**judge["train"]),
        "{before:.1%} → {after:.1%}".format(**judge["heldout"]),
        "{before:.2f} → {after:.2f}".format(**vendi),
        f"{summary['reward_queries']:,}",
        f"{summary['unet_evals']:,}",
        f"{summary['seconds']:.0f} s",
        f"{wall:.0f} s",
        f"{peak / 2**30:.1f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def watched(command: list[str]) -> int:
    """Run a command to its end; returns the peak memory of it and all it started, in bytes."""
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, family_memory(process.pid))
        time.sleep(SAMPLE_EVERY)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return peak


def family_memory(pid: int) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # ended between listing and asking
    except psutil.NoSuchProcess:
        return total
    return total


if __name__ == "__main__":
    main()
