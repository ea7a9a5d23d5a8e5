"""System metrics of a machine, read every few seconds beside the work, under MLflow's names.

A thread of each worker reads them, and the readings travel with the receipts of its calls. That
takes no further process and no further call, and a machine that is lost takes only its last
readings along. MLflow's own monitors are not used, because workers do not import MLflow.
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

HELD = 360  # readings that may wait for a receipt; beyond that the oldest are dropped
FAULTS = (OSError, RuntimeError, psutil.Error)


@dataclass(frozen=True)
class Reading:
    """System metrics of a machine at one moment.

    Attributes:
        time: seconds since 1970.
        host: name of the machine.
        figures: by MLflow's names, without `system/`.
    """

    time: float
    host: str
    figures: dict[str, float]


class Usage:
    """Reads this machine in a thread, from its construction on.

    Args:
        every: seconds between readings.
    """

    def __init__(self, every: float) -> None:
        self.every = every
        self._read: deque[Reading] = deque(maxlen=HELD)
        self._end = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def taken(self) -> tuple[Reading, ...]:
        """The readings that were not taken yet, oldest first."""
        readings = []
        with contextlib.suppress(IndexError):
            while True:
                readings.append(self._read.popleft())
        return tuple(readings)

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
    """The figures of all sources; those that this machine does not have are left out."""
    figures: dict[str, float] = {}
    for source in sources:
        with contextlib.suppress(*FAULTS):
            figures |= source()
    return {name: round(value, 2) for name, value in figures.items()}


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
    """A source for each figure of each NVIDIA GPU, as some cards do not have all of them."""
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
        usage = pynvml.nvmlDeviceGetMemoryInfo(card)
        return {
            "memory_usage_megabytes": usage.used / 1e6,
            "memory_usage_percentage": 100 * usage.used / usage.total,
        }

    def busy(card: object) -> dict[str, float]:
        return {"utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(card).gpu)}

    def power(card: object) -> dict[str, float]:
        return {"power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(card) / 1000}

    return [source(card, i, read) for i, card in enumerate(cards) for read in (memory, busy, power)]
