"""The run's page: one HTML file that shows what came of a run, or how it goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from b2ray.config import Config

FILE = "report.html"


def write(path: Path, config: Config, output: Path | None = None) -> Path:
    """Write a run's page; returns its file, by default RUN/report.html.

    Raises:
        OSError, ValueError, KeyError: a file of the run's is missing or broken, or the disk full.
    """
    from b2ray.report.page import page  # matplotlib, and most of a run does without

    file = path / FILE if output is None else output
    text = page(path, config)
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


def try_to_write(path: Path, config: Config) -> Path | None:
    """`write` at the end of a run, which a page that cannot be made does not fail."""
    try:
        return write(path, config)
    except Exception as error:  # whatever it is, the run is worth more
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"warning: the run's page could not be made ({reason})", file=sys.stderr)
        return None
