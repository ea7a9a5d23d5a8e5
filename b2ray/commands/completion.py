"""`b2ray completion`: a script with which a shell completes commands, options, files and runs."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from typing import Any

import shtab

from b2ray.cli import COMMANDS
from b2ray.commands.common import Parser, execute
from b2ray.options import full_parser

SHELLS = ("bash", "zsh")
# Names of runs, where they usually are.
RUNS = shtab.cmd("ls runs/*/config.yaml 2>/dev/null | cut -d/ -f2")
PLACES = {
    "RUN": RUNS,
    "FILE": shtab.FILE,
    "PATH": shtab.FILE,
    "PICTURE": shtab.FILE,
    "FOLDER": shtab.DIRECTORY,
}
# Fields of a configuration that are files or folders.
FILES = ("model.path", "model.config", "prompts.train", "prompts.heldout", "demonstrations.path")
FOLDERS = ("runs",)
TOLD = """\
bash: b2ray completion bash > ~/.local/share/bash-completion/completions/b2ray
zsh:  b2ray completion zsh > "${fpath[1]}/_b2ray"

Then start another shell. Values complete after a space: --config FILE, not --config=FILE."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code of `b2ray.errors`."""
    return execute(make_parser(), completion, argv)


def completion(args: argparse.Namespace) -> dict[str, Any]:
    """Print the script."""
    print(shtab.complete(whole_parser(), args.shell))
    return {}


def whole_parser() -> argparse.ArgumentParser:
    """All commands with all their options in one parser, which is never used to parse."""
    whole = argparse.ArgumentParser(prog="b2ray", description="Run B²-DiffuRL and look at it.")
    commands = whole.add_subparsers(metavar="COMMAND")
    groups: dict[str, Any] = {"": commands}
    for words, (module, line) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            groups[group] = commands.add_parser(group, help=line).add_subparsers()
        one = full_parser() if name == "run" else importlib.import_module(module).make_parser()
        for action in one._actions:
            _say_what_completes(action)
        groups[group].add_parser(name, help=line, parents=[one], add_help=False)
    return whole


def _say_what_completes(action: Any) -> None:
    """Give an option what shtab looks at: `complete`, or the values to choose from."""
    if isinstance(action, argparse._SubParsersAction) or action.nargs == 0:
        return
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    field = next(iter(action.option_strings), "").removeprefix("--")
    if metavar in PLACES:
        action.complete = PLACES[metavar]
    elif field in FILES or field in FOLDERS:
        action.complete = shtab.FILE if field in FILES else shtab.DIRECTORY
    elif "|" in metavar and not action.choices:
        # N, X, TEXT and JSON stand for what cannot be listed.
        action.choices = [word for word in metavar.split("|") if not re.fullmatch("[A-Z]+", word)]


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="b2ray completion",
        description="Print a script that lets a shell complete commands, options, their values, "
        "files, and the names of runs in the working directory's runs.",
        epilog=TOLD,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    return parser
