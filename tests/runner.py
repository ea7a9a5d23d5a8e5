"""Running commands on small models, and processes to be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from b2ray.diffusion.lora_file import FILE
from b2ray.run import main
from tests.models import arguments
from tests.warm import Pool

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cluster:
    """A Ray of our own: its address, and the process that its workers descend from."""

    address: str
    raylet: int

    def workers(self, kind: str) -> list[psutil.Process]:
        """Processes of actors of a class, by the title that Ray gives them."""
        found = []
        for child in psutil.Process(self.raylet).children(recursive=True):
            try:
                if child.cmdline() and child.cmdline()[0].startswith(f"ray::{kind}"):
                    found.append(child)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found


@dataclass
class Runner:
    """Runs commands on the small models in this process.

    Attributes:
        pool: where their actors come from; None starts each in a process of its own.
    """

    models: Path
    runs: Path
    pool: Pool | None

    def here(self, name: str, *more: str, **over: object) -> int:
        """`b2ray run` with the settings of `tests.models.arguments`; returns its exit code."""
        return self.call(main, [*arguments(self.models, self.runs, name, **over), *more])

    def call(self, command: Callable[[list[str]], int], argv: list[str]) -> int:
        """A command's main function; returns its exit code."""
        with self.pool.used() if self.pool else contextlib.nullcontext():
            return command(argv)

    def lora(self, name: str) -> bytes:
        return (self.runs / name / "lora" / FILE).read_bytes()

    def figures(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: before the run, then a stage each."""
        text = (self.runs / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def lines(self, name: str) -> int:
        file = self.runs / name / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0


@dataclass
class ColdRunner(Runner):
    """Runs commands whose processes are started for them alone, so that they can be killed."""

    address: str

    def process(self, name: str, *more: str, **over: object) -> subprocess.Popen[str]:
        """The command in a process of its own, on the same Ray."""
        command = [*arguments(self.models, self.runs, name, **over), *more]
        return subprocess.Popen(
            [sys.executable, "-m", "b2ray.run", *command],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_after(self, lines: int, name: str, **over: object) -> None:
        """Start a run, and SIGKILL it as soon as it has so many lines of figures."""
        process = self.process(name, **over)
        try:
            when(lambda: self.lines(name) >= lines, within=240)
        finally:
            process.kill()
            process.wait(30)


def when(condition: Callable[[], bool], within: float = 120.0) -> None:
    """Wait for a condition, a bounded time."""
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, "the moment to wait for never came"
        time.sleep(0.01)


def kill_when(
    condition: Callable[[], bool], victims: Callable[[], list[psutil.Process]]
) -> threading.Thread:
    """Kill -9 the first victim as soon as a condition holds; join the thread to be sure."""

    def work() -> None:
        when(lambda: condition() and bool(victims()))
        os.kill(victims()[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread
