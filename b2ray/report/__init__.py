"""The run's page: one HTML file that shows what came of a run, or how it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

from b2ray.config import Config
from b2ray.tracking.folder import write_atomically

FILE = "report.html"


def write(path: Path, config: Config, output: Path | None = None) -> Path:
    """Write a run's page; returns its file, by default RUN/report.html.

    Raises:
        OSError, ValueError, KeyError: a file of the run's is missing or broken, or the disk full.
    """
    from b2ray.report.page import page  # matplotlib, and most of a run does without

    file = path / FILE if output is None else output
    write_atomically(file, page(path, config))
    return file


def verdict(path: Path, config: Config) -> str:
    """What came of a run, in a line; empty if that cannot be told."""
    from b2ray.report import words
    from b2ray.report.record import Record

    try:
        return words.verdict(Record.read(path, config))
    except (OSError, ValueError, KeyError):
        return ""


def try_to_write(path: Path, config: Config) -> Path | None:
    """`write` at the end of a run, which a page that cannot be made does not fail."""
    try:
        return write(path, config)
    except Exception as error:  # whatever it is, the run is worth more
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"warning: the run's page could not be made ({reason})", file=sys.stderr)
        return None
