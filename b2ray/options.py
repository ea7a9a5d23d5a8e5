"""From files, presets and the command line to a `Config`.

Later wins: defaults < the file's preset < the file < the command line's preset < the command line.
So `--config my.yaml --preset=ddpo` is my.yaml with DDPO's method, and single fields still override.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from b2ray.config import Config
from b2ray.discretion import shown
from b2ray.errors import EXIT_DONE, ConfigError

PACKAGE = Path(__file__).parent
QUICKSTART = "configs/quickstart.yaml"


class _Parser(argparse.ArgumentParser):
    """An argument parser that complains in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all fields)")


@dataclass(frozen=True)
class Words:
    """The command line as it was given: its options, and the fields it sets, unvalidated."""

    config: str | None
    resume: bool
    print_config: bool
    sweep: str | None
    json: bool
    fields: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """The resolved configuration and what the command was asked to do with it."""

    config: Config
    resume: bool
    print_config: bool


def find(path: str) -> Path | None:
    """A file or folder seen from the working directory, then from where b2ray is installed."""
    given = Path(os.path.expanduser(path))
    places = [given, PACKAGE.parent / given, PACKAGE / given]
    # Unlike Path.exists, this says no to a name that is too long for the disk.
    return next((p for p in places if os.path.exists(p)), None)


def parse(argv: Sequence[str]) -> Options:
    """Resolve the command line. Raises `ConfigError` with one sentence; `--help` exits."""
    words = read_words(argv)
    if words.sweep is not None or words.json:
        raise ConfigError("--sweep and its --json go with `b2ray run`: leave them out here")
    config = resolved(base(words.config, words.resume, words.fields), words.fields)
    return Options(config, words.resume, words.print_config)


def read_words(argv: Sequence[str]) -> Words:
    """Read the command line. Raises `ConfigError` with one sentence; `--help` exits."""
    if any(a in ("-h", "--help") for a in argv):
        full_parser().print_help()
        raise SystemExit(EXIT_DONE)
    flags, rest = _flags().parse_known_args(list(argv))
    return Words(fields=_command_line(rest), **vars(flags))


def resolved(*layers: Mapping[str, Any]) -> Config:
    """The configuration of several layers of values, each over the one before it.

    Of the presets that they name the last one counts, right below the layer that names it.
    """
    last = max((i for i, layer in enumerate(layers) if "preset" in layer), default=0)
    merged: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        merged = merge(merged, _with_preset(layer) if i == last else layer)
    config = validated(merged)
    return config.model_copy(update={"runs": runs_folder(config.runs)})


def overridden(values: Mapping[str, Any], argv: Sequence[str]) -> Config:
    """The configuration in a file's values, with `--section.field=value` over them."""
    return resolved(values, _command_line(argv))


def in_job_copy() -> bool:
    """Whether the working directory is the copy that Ray made for a job, and will delete."""
    return "working_dir_files" in Path.cwd().parts


def runs_folder(given: str) -> str:
    """The folder of all runs, from the field `runs` or the option `--runs`.

    A relative one is seen from the working directory; in a job's copy of it, where it would be lost
    with the copy, from $B2RAY_HOME, else from the home folder on the job's machine.
    """
    try:
        path = Path(given).expanduser()
        if path.is_absolute() or not in_job_copy():
            return str(path)
        home = Path(os.environ.get("B2RAY_HOME") or Path.home())
    except RuntimeError as error:
        raise ConfigError(f"runs is {given!r} but there is no home folder: make it absolute") from (
            error
        )
    if not home.is_absolute():
        raise ConfigError(f"B2RAY_HOME is {str(home)!r}, not an absolute folder: make it one")
    return str(home / path)


def validated(values: Mapping[str, Any]) -> Config:
    """A `Config` from plain values, or `ConfigError` naming the first wrong field."""
    values = _with_preset({"preset": Config.model_fields["preset"].default, **values})
    for key, value in values.items():
        if key not in Config.model_fields:
            raise ConfigError(f"{key} is not a field (value {shown(key, value)}): --help lists all")
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(sentence(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping at its top."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `section: {{field: value}}` pairs, not {values!r}")
    return values


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section; lists are replaced whole."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values over those of the preset they name, if they name one."""
    if "preset" not in values:
        return dict(values)
    path = PACKAGE / "presets" / f"{values['preset']}.yaml"
    # An unknown name is left to the validation, which lists the known ones.
    known = path in (PACKAGE / "presets").glob("*.yaml")
    return merge(read_yaml(path), values) if known else dict(values)


def base(config: str | None, resume: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """The file that the command line is laid over."""
    if config is None and resume:
        if "name" not in given:
            raise ConfigError("--resume needs --name=NAME, the run to go on with, or --config FILE")
        runs = runs_folder(str(given.get("runs", "runs")))
        saved = Path(runs) / str(given["name"]) / "config.yaml"
        if not os.path.exists(saved):
            raise ConfigError(
                f"--resume: {saved.parent} has no run; check --name and --runs, or start one with "
                "--config"
            )
        return {**read_yaml(saved), "runs": runs}  # the folder may have been moved
    path = find(config or QUICKSTART)
    if path is None or not path.is_file():
        raise ConfigError(f"--config {config or QUICKSTART}: there is no such file")
    return read_yaml(path)


def full_parser() -> argparse.ArgumentParser:
    """Every option and field with what it is, for help and for completion in a shell."""
    parser = _source_parser([_flags()])
    CliSettingsSource[Any](Config, root_parser=parser, cli_parse_args=False, **_STYLE)
    for action in parser._actions:
        if action.help and action.help.startswith("set ") and action.help.endswith("{})"):
            action.help = argparse.SUPPRESS  # a whole section as JSON
        elif action.help:
            # The text says what an empty field means.
            action.help = re.sub(r" \(default: (null|None|\(\)|\{\})\)$", "", action.help)
        if isinstance(action.metavar, str):
            action.metavar = _readable(action.metavar)
    return parser


def _readable(kind: str) -> str:
    """pydantic's words for a field's type, such as {int,auto}, as a person would write them."""
    plain = re.sub(r"(tuple|dict)\[.*?\]|\[JSON\]", "JSON", kind)
    return "|".join(_TYPES.get(part, part) for part in plain.translate(_NO_BRACES).split(","))


_STYLE: dict[str, Any] = {
    "cli_exit_on_error": False,
    "cli_hide_none_type": True,
    "cli_use_class_docs_for_groups": True,
    "cli_enforce_required": False,
}
_TYPES = {"str": "TEXT", "int": "N", "float": "X", "bool": "true|false"}
_NO_BRACES = str.maketrans("", "", "{}")


def _flags() -> argparse.ArgumentParser:
    """The options of the command that are no fields."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help=f"YAML file (default: {QUICKSTART})")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with runs/NAME, with its own configuration if --config is not given "
        "(an unfinished run with the same configuration is resumed without this, too)",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and end"
    )
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        help="run several configurations side by side and compare them: YAML of a grid or of "
        "samples of fields (docs/sweeps.md)",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --sweep: print the comparison as JSON"
    )
    return parser


def _source_parser(parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    return _Parser(
        prog="python -m b2ray.run",
        usage="%(prog)s [--config FILE] [--resume] [--section.field=value ...]",
        parents=list(parents),
        description=f"{Config.__doc__} The defaults shown are b2ray's own; the preset's, the "
        "file's and the command line's values go over them, in this order.",
        allow_abbrev=False,
    )


def _command_line(argv: Sequence[str]) -> dict[str, Any]:
    """Values given as --section.field=value, unvalidated."""
    try:
        source = CliSettingsSource[Any](
            Config, root_parser=_source_parser(), cli_parse_args=list(argv), **_STYLE
        )
        return dict(source())
    except SettingsError as error:
        raise ConfigError(f"{error} (--help lists all fields)") from error


def sentence(error: ValidationError) -> str:
    """The first problem as one sentence with the field, the value and what would be right."""
    first, *others = error.errors()
    field = _field(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message}"
    if first["type"] == "missing":
        return f"{field} is missing: set it in the file or with --{field}=…"
    if first["type"] == "extra_forbidden":
        return f"{field} is not a field (value {shown(field, first['input'])}): --help lists all"
    # A field of several kinds says what is wrong with the value as each of them.
    same = (e["msg"] for e in others if f"{_field(e['loc'])}.".startswith(f"{field}."))
    kinds = [message, *same]
    wrong = ", or ".join(m[0].lower() + m[1:] for m in dict.fromkeys(kinds))
    value = shown(field, first["input"])
    return f"{field} is {value}: {wrong}"


def _field(loc: Sequence[int | str]) -> str:
    """Where in the file: without pydantic's words for the kinds that a field may have."""
    return ".".join(str(part) for part in loc if str(part).isidentifier() or isinstance(part, int))
