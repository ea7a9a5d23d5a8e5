"""`b2ray report`: writes the page of a run as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2ray.commands.common import CommandParser, add_json, add_run, execute
from b2ray.config.load import read_yaml, validated
from b2ray.errors import ConfigError
from b2ray.report import write
from b2ray.tracking.trained import run_folder


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, one of `b2ray.errors`."""
    return execute(make_parser(), report, argv)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Write the page, say where, and return what --json prints.

    Raises:
        ConfigError: there is no such run, its files are broken, or the page cannot be written.
    """
    path = run_folder(args.run, args.runs)
    config = validated(read_yaml(path / "config.yaml"))
    output = Path(args.output).expanduser() if args.output else None
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output} is a folder: give the file's name, too")
    try:
        file = write(path, config, output)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has a file that cannot be read: {error!r}") from error
    print(f"{file} ({file.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return {"run": config.name, "page": str(file), "bytes": file.stat().st_size}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="b2ray report",
        description="Write a run's page: what came of it, how it went, pictures before and after, "
        "branch trees, where the time went. One HTML file that needs no network; a finished run "
        "has it already. A run that goes on is shown as far as it is: b2ray watch follows it.",
    )
    add_run(parser, stages=False)
    parser.add_argument("--output", metavar="FILE", help="the file (default: RUN/report.html)")
    add_json(parser)
    return parser
