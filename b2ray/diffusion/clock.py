"""How long a device is at work on something, without waiting for it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class Clock:
    """Runs inside `with clock:`.

    A GPU does its work after the call that asks for it has returned: there events mark the
    device's own time, and nothing waits for them before `seconds` is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._total = 0.0
        self._began: Any = None
        self._marks: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self._marks.append((self._began, self._now()))
        else:
            self._total += self._now() - self._began

    @property
    def seconds(self) -> float:
        """In total so far; on a GPU this waits for what the clock has seen."""
        if self._marks:
            self._marks[-1][1].synchronize()
            self._total += sum(a.elapsed_time(b) for a, b in self._marks) / 1000
            self._marks.clear()
        return self._total

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
