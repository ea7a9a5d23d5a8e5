"""The run's page: one HTML file that shows the results of a run, or how far it is."""

from __future__ import annotations

import sys
from pathlib import Path

from b2ray.config import Config
from b2ray.tracking.folder import write_atomically

FILE = "report.html"


def write(path: Path, config: Config, output: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        path: the run's folder.
        config: the run's configuration.
        output: the file to write; RUN/report.html by default.

    Returns:
        The file.

    Raises:
        OSError: a file of the run is missing, or the page cannot be written.
        ValueError, KeyError: a file of the run is broken.
    """
    from b2ray.report.page import page  # imports matplotlib, which the rest of a run does not need

    file = path / FILE if output is None else output
    write_atomically(file, page(path, config))
    return file


def verdict(path: Path, config: Config) -> str:
    """Return the outcome of a run in one line; an empty text if its files cannot be read."""
    from b2ray.report import words
    from b2ray.report.record import Record

    try:
        return words.verdict(Record.read(path, config))
    except (OSError, ValueError, KeyError):
        return ""


def try_to_write(path: Path, config: Config) -> Path | None:
    """Write the page at the end of a run; print a warning if it cannot be written.

    Returns:
        The file; None if there is none.
    """
    try:
        return write(path, config)
    except Exception as error:  # no error of the page may fail a run that has finished
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"warning: the run's page could not be made ({reason})", file=sys.stderr)
        return None
