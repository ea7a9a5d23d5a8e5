"""system.jsonl: how busy the machines of a run were, in all processes that worked on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2ray.actors.system_metrics import Reading, Usage

Line = dict[str, Any]


class SystemMetrics:
    """Writes readings of the machines of the driver and of the workers, one per machine and moment.

    Args:
        file: where the readings are written.
        every: seconds between readings; 0 turns them off.
    """

    def __init__(self, file: Path, every: float) -> None:
        self.file, self.every = file, every
        self._own = Usage(every) if every else None
        self._last: set[tuple[str, int]] = set()

    def add(self, readings: Sequence[Reading] = ()) -> None:
        """Write the driver's new readings and those of workers; if the disk refuses, lose them."""
        if self._own is None:
            return
        lines = []
        for reading in (*self._own.taken(), *readings):
            # Every worker of a machine reads it, and one reading is enough.
            moment = reading.host, int(reading.time / self.every)
            if moment not in self._last:
                self._last.add(moment)
                lines.append({"time": reading.time, "host": reading.host, **reading.figures})
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8") as file:
                file.write(text)

    def close(self) -> None:
        """Write the last readings of the driver and stop reading its machine."""
        self.add()
        if self._own is not None:
            self._own.stop()


def read(file: Path, offset: int = 0) -> tuple[list[Line], int]:
    """Read the lines of system.jsonl from an offset on.

    A line that is still being written is left for the next call; a broken line is skipped.

    Args:
        file: the file, which may not exist yet.
        offset: the number of bytes to skip.

    Returns:
        The lines, and the offset for the next call.
    """
    if not file.exists():
        return [], offset
    with file.open("rb") as opened:
        opened.seek(offset)
        content = opened.read()
    complete = content[: content.rfind(b"\n") + 1]
    lines = []
    for line in complete.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines, offset + len(complete)
