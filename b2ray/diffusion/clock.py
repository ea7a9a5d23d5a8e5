"""A stopwatch for a device that keeps the CPU from waiting for the GPU."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class Clock:
    """Adds up the time that a device spends on the code inside `with clock:`.

    A GPU works on after the call that started its work has returned. So the clock records CUDA
    events around the code, and nothing waits for them before `seconds` is read.

    Args:
        device: the device whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._total = 0.0
        self._start: Any = None
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self._events.append((self._start, self._now()))
        else:
            self._total += self._now() - self._start

    @property
    def seconds(self) -> float:
        """Seconds in total so far. On a GPU, reading this waits for the measured work to finish."""
        if self._events:
            self._events[-1][1].synchronize()
            self._total += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return self._total

    def _now(self) -> Any:
        """A CUDA event on a GPU, seconds elsewhere."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
