"""`b2ray completion`: prints a script that lets a shell complete commands, options and runs."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from typing import Any

import shtab

from b2ray.cli import COMMANDS
from b2ray.commands.common import CommandParser, execute
from b2ray.config.load import full_parser

SHELLS = ("bash", "zsh")
# The shell command that lists the names of runs in their default folder.
RUNS = shtab.cmd("ls runs/*/config.yaml 2>/dev/null | cut -d/ -f2")
PLACES = {
    "RUN": RUNS,
    "FILE": shtab.FILE,
    "PATH": shtab.FILE,
    "PICTURE": shtab.FILE,
    "FOLDER": shtab.DIRECTORY,
}
# The fields of a configuration whose values are files or folders.
FILES = ("model.path", "model.config", "prompts.train", "prompts.heldout", "demonstrations.path")
FOLDERS = ("runs",)
INSTRUCTIONS = """\
bash: b2ray completion bash > ~/.local/share/bash-completion/completions/b2ray
zsh:  b2ray completion zsh > "${fpath[1]}/_b2ray"

Then start another shell. Values complete after a space: --config FILE, not --config=FILE."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, one of `b2ray.errors`."""
    return execute(make_parser(), completion, argv)


def completion(args: argparse.Namespace) -> dict[str, Any]:
    """Print the script."""
    print(shtab.complete(whole_parser(), args.shell))
    return {}


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser with all options of all commands, from which shtab makes the script.

    It describes the command line only, and never parses one.
    """
    parser = argparse.ArgumentParser(prog="b2ray", description="Run B²-DiffuRL and look at it.")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (module, line) in COMMANDS.items():
        command = full_parser() if name == "run" else importlib.import_module(module).make_parser()
        for action in command._actions:
            _add_completion(action)
        commands.add_parser(name, help=line, parents=[command], add_help=False)
    return parser


def _add_completion(action: Any) -> None:
    """Give an option what shtab reads: its attribute `complete`, or the values to choose from."""
    if isinstance(action, argparse._SubParsersAction) or action.nargs == 0:
        return
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    field = next(iter(action.option_strings), "").removeprefix("--")
    if metavar in PLACES:
        action.complete = PLACES[metavar]
    elif field in FILES or field in FOLDERS:
        action.complete = shtab.FILE if field in FILES else shtab.DIRECTORY
    elif "|" in metavar and not action.choices:
        # Words in capitals such as N, TEXT and JSON stand for values that cannot be listed.
        action.choices = [word for word in metavar.split("|") if not re.fullmatch("[A-Z]+", word)]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="b2ray completion",
        description="Print a script that lets a shell complete commands, options, their values, "
        "files, and the names of runs in the working directory's runs.",
        epilog=INSTRUCTIONS,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    return parser
