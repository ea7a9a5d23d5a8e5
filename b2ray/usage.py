"""How busy a machine is: read every few seconds beside the work, under MLflow's names.

A thread of each worker reads, and the readings travel with the receipts of its calls: no process
more, no call more, and a machine that goes takes only its last readings along.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import psutil

HELD = 360  # readings that wait for a receipt, at the most; then the oldest are lost
FAULTS = (OSError, RuntimeError, psutil.Error)


@dataclass(frozen=True)
class Reading:
    """How busy a machine was.

    Attributes:
        time: seconds since 1970.
        figures: by MLflow's names, without `system/`.
    """

    time: float
    host: str
    figures: dict[str, float]


class Usage:
    """Reads this machine every so many seconds, from its making on."""

    def __init__(self, every: float) -> None:
        self.every = every
        self._read: deque[Reading] = deque(maxlen=HELD)
        self._end = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def taken(self) -> tuple[Reading, ...]:
        """The readings that were not taken yet, oldest first."""
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._read.popleft())
        return tuple(found)

    def stop(self) -> None:
        """Read no more."""
        self._end.set()

    def _watch(self) -> None:
        sources = [_processors, _memory, _disk, _Network().figures, *_gpus()]
        _figures(sources)  # shares of time are since the call before
        host = socket.gethostname()
        while not self._end.wait(self.every):
            self._read.append(Reading(time.time(), host, _figures(sources)))


Source = Callable[[], dict[str, float]]


def _figures(sources: list[Source]) -> dict[str, float]:
    """All that can be read; what this machine does not tell is left out."""
    found: dict[str, float] = {}
    for source in sources:
        with contextlib.suppress(*FAULTS):
            found |= source()
    return {name: round(value, 2) for name, value in found.items()}


def _processors() -> dict[str, float]:
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def _memory() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
    }


def _disk() -> dict[str, float]:
    disk = psutil.disk_usage(os.sep)
    return {
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }


class _Network:
    """Megabytes a second since the call before."""

    def __init__(self) -> None:
        self._before: tuple[float, float, float] | None = None

    def figures(self) -> dict[str, float]:
        counted = psutil.net_io_counters()
        now = time.monotonic(), counted.bytes_recv / 1e6, counted.bytes_sent / 1e6
        before, self._before = self._before or now, now
        seconds = max(1e-3, now[0] - before[0])
        return {
            "network_receive_megabytes_per_second": (now[1] - before[1]) / seconds,
            "network_transmit_megabytes_per_second": (now[2] - before[2]) / seconds,
        }


def _gpus() -> list[Source]:
    """A source for each figure of each NVIDIA GPU: some cards do not tell all of them."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cards = list(map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())))
    except pynvml.NVMLError:
        return []  # no driver, or no card

    def source(card: object, i: int, read: Callable[[object], dict[str, float]]) -> Source:
        def figures() -> dict[str, float]:
            try:
                return {f"gpu_{i}_{name}": value for name, value in read(card).items()}
            except pynvml.NVMLError:
                return {}

        return figures

    def memory(card: object) -> dict[str, float]:
        found = pynvml.nvmlDeviceGetMemoryInfo(card)
        return {
            "memory_usage_megabytes": found.used / 1e6,
            "memory_usage_percentage": 100 * found.used / found.total,
        }

    def busy(card: object) -> dict[str, float]:
        return {"utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(card).gpu)}

    def power(card: object) -> dict[str, float]:
        return {"power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(card) / 1000}

    return [source(card, i, read) for i, card in enumerate(cards) for read in (memory, busy, power)]
