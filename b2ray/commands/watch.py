"""`b2ray watch`: serves the page of a run while it goes on, to this machine only."""

from __future__ import annotations

import argparse
import contextlib
import sys
import webbrowser
from collections.abc import Sequence
from typing import Any

from b2ray.commands.common import CommandParser, add_run, execute
from b2ray.config.load import read_yaml, validated
from b2ray.tracking.trained import run_folder

PORT = 8270


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, one of `b2ray.errors`."""
    return execute(make_parser(), watch, argv)


def watch(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: there is no such run, or the port cannot be used.
    """
    path = run_folder(args.run, args.runs)
    config = validated(read_yaml(path / "config.yaml"))
    from b2ray.report.watch import HOST, server

    with server(path, config, args.port) as serving:
        address = f"http://{HOST}:{serving.server_address[1]}/"
        print(f"{config.name}: {address} (Ctrl-C ends it, not the run)", flush=True)
        if args.open:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            serving.serve_forever()
    return {}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="b2ray watch",
        description="Serve a run's page on this machine (127.0.0.1 only). It shows a stage as soon "
        "as it is done. The run does not notice.",
    )
    add_run(parser, stages=False)
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        metavar="N",
        help="the port; 0: one that is free (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
