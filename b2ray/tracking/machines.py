"""system.jsonl: how busy the machines of a run were, over all tries of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2ray.usage import Reading, Usage

Line = dict[str, Any]


class Machines:
    """Writes what workers read of their machines, once a machine and moment, and reads its own.

    Args:
        every: seconds between readings; 0: nothing is read or written.
    """

    def __init__(self, file: Path, every: float) -> None:
        self.file, self.every = file, every
        self._own = Usage(every) if every else None
        self._last: set[tuple[str, int]] = set()

    def add(self, readings: Sequence[Reading] = ()) -> None:
        """Keep the workers' readings and the driver's own; never fails."""
        if self._own is None:
            return
        lines = []
        for reading in (*self._own.taken(), *readings):
            # Workers of one machine all read it.
            moment = reading.host, int(reading.time / self.every)
            if moment not in self._last:
                self._last.add(moment)
                lines.append({"time": reading.time, "host": reading.host, **reading.figures})
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8") as file:
                file.write(text)

    def close(self) -> None:
        """Keep the last readings."""
        self.add()
        if self._own is not None:
            self._own.stop()


def read(file: Path, offset: int = 0) -> tuple[list[Line], int]:
    """The lines after so many bytes, and where they end: where the next call goes on.

    A line that is being written is left for later, one whose process died over it is left out.
    """
    if not file.exists():
        return [], offset
    with file.open("rb") as opened:
        opened.seek(offset)
        content = opened.read()
    whole = content[: content.rfind(b"\n") + 1]
    lines = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines, offset + len(whole)
