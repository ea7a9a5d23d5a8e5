"""Start-up time and memory of a run on several raylets on one machine.

    python -m benchmarks.fleet.raylets [--nodes 3]

Starts a cluster with cluster/local.py, runs two stages of the quickstart on it, and stops it.
Memory is the sum of the processes' proportional set sizes, so that what they share counts once.
docs/evidence/scaling.md has the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LOCAL = Path(__file__).parents[2] / "cluster" / "local.py"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet.raylets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--nodes", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="b2ray-") as place:
        state = Path(place) / "cluster"

        def local(command: str, *more: str) -> str:
            line = [sys.executable, LOCAL, command, "--state", state, *more]
            return subprocess.run(line, check=True, capture_output=True, text=True).stdout

        began = time.perf_counter()
        exports = local("start", "--nodes", str(options.nodes), "--cpus", "2")
        alive = time.perf_counter() - began
        try:
            time.sleep(5)
            idle = memory(roots(state))
            lines = [line.split(" ", 1)[1] for line in exports.splitlines() if "=" in line]
            env = dict(line.split("=", 1) for line in lines)
            rows = run(state, Path(place) / "runs", {**os.environ, **env})
        finally:
            local("stop")
    print(f"{options.nodes} raylets on {psutil.cpu_count()} cores\n\n| what | |\n|---|---|")
    print(f"| nodes alive | {alive:.0f} s |\n| memory of idle nodes | {idle / 2**30:.2f} GiB |")
    for what, value in rows:
        print(f"| {what} | {value} |")


def run(state: Path, runs: Path, env: dict[str, str]) -> list[tuple[str, str]]:
    """Two stages of the quickstart; when it got where, and the most memory of nodes and driver."""
    command = [sys.executable, "-m", "b2ray.run", "--config=configs/quickstart.yaml"]
    command += ["--curriculum.stages=2", "--name=two", f"--runs={runs}", "--evaluation.images=32"]
    command += ["--evaluation.final_images=32", "--evaluation.every=0"]
    began = time.perf_counter()
    with (runs.parent / "log").open("w") as log:
        driver = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    events, peak, loaded, fleet = runs / "two" / "fleet.jsonl", 0, 0.0, 0.0
    while driver.poll() is None:
        peak = max(peak, memory([*roots(state), driver.pid]))
        if events.exists() and not fleet:
            kinds = [json.loads(line)["slot"] for line in events.read_text().splitlines()]
            loaded = loaded or time.perf_counter() - began
            if len(set(kinds)) == 4:  # learner, two samplers, scorer
                fleet = time.perf_counter() - began
        time.sleep(0.5)
    took = time.perf_counter() - began
    if driver.returncode:
        raise SystemExit((runs.parent / "log").read_text())
    return [
        ("first actor ready, after the command", f"{loaded:.0f} s"),
        ("all four actors ready", f"{fleet:.0f} s"),
        ("two stages and two evaluations done", f"{took:.0f} s"),
        ("most memory, nodes, actors and driver", f"{peak / 2**30:.2f} GiB"),
    ]


def roots(state: Path) -> list[int]:
    """The nodes' own processes."""
    return [node["pid"] for node in json.loads((state / "cluster.json").read_text())["nodes"]]


def memory(pids: list[int]) -> int:
    """Bytes of these processes and their descendants."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
