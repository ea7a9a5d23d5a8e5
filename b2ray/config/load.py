"""Build a `Config` from files, presets and the command line.

Each layer overrides those before it: the defaults, the file's preset, the file, the command line's
preset, the command line's other fields. So `--config my.yaml --preset=ddpo` is my.yaml with the
method of DDPO.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from b2ray.config import Config
from b2ray.config.arguments import SentenceParser
from b2ray.config.legacy import updated, updated_words
from b2ray.config.paths import PACKAGE, QUICKSTART, find, runs_folder
from b2ray.config.secrets import shown
from b2ray.errors import EXIT_DONE, ConfigError

HINT = "--help lists all fields"


@dataclass(frozen=True)
class Words:
    """The command line before any validation.

    Attributes:
        config: the file of `--config`; None if there is none.
        resume: whether to continue an earlier run.
        print_config: whether to print the configuration and end.
        sweep: the file of `--sweep`; None if there is none.
        json: whether to print the comparison of a sweep as JSON.
        stop_with_stdin: whether to stop when the standard input ends.
        fields: the nested values of all options `--section.field=value`.
    """

    config: str | None
    resume: bool
    print_config: bool
    sweep: str | None
    json: bool
    stop_with_stdin: bool
    fields: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """The resolved configuration, with the options of `Words` that say what to do with it."""

    config: Config
    resume: bool
    print_config: bool
    stop_with_stdin: bool


def parse(argv: Sequence[str]) -> Options:
    """Resolve the command line of a single run; `--help` prints the help and exits.

    Raises:
        ConfigError: something is wrong, in one sentence.
    """
    words = read_words(argv)
    if words.sweep is not None or words.json:
        raise ConfigError("--sweep and its --json go with `b2ray run`: leave them out here")
    config = resolved(base(words.config, words.resume, words.fields), words.fields)
    return Options(config, words.resume, words.print_config, words.stop_with_stdin)


def read_words(argv: Sequence[str]) -> Words:
    """Read the command line without validating fields; `--help` prints the help and exits.

    Raises:
        ConfigError: an option or a field is unknown.
    """
    if any(a in ("-h", "--help") for a in argv):
        full_parser().print_help()
        raise SystemExit(EXIT_DONE)
    flags, rest = _flags().parse_known_args(list(argv))
    return Words(fields=_command_line(rest), **vars(flags))


def resolved(*layers: Mapping[str, Any]) -> Config:
    """The configuration of several layers of values, each of which overrides those before it.

    If several layers name a preset, only the last of these presets is used. The layer that names it
    overrides it, and it overrides the layers before.

    Raises:
        ConfigError: a value is wrong, or they do not fit each other.
    """
    preset_layer = max((i for i, layer in enumerate(layers) if "preset" in layer), default=0)
    merged: dict[str, Any] = {}
    for i, layer in enumerate(map(updated, layers)):
        merged = merge(merged, _with_preset(layer) if i == preset_layer else layer)
    config = validated(merged)
    return config.model_copy(update={"runs": runs_folder(config.runs)})


def overridden(values: Mapping[str, Any], argv: Sequence[str]) -> Config:
    """The configuration of a file's values and the fields of a command line, which override them.

    Args:
        values: nested values of the file.
        argv: words of the form `--section.field=value`.
    """
    return resolved(values, _command_line(argv))


def validated(values: Mapping[str, Any]) -> Config:
    """Make a `Config` from plain nested values.

    Raises:
        ConfigError: a field is wrong; the sentence names the first such field.
    """
    values = _with_preset({"preset": Config.model_fields["preset"].default, **updated(values)})
    for key, value in values.items():
        if key not in Config.model_fields:
            raise ConfigError(f"{key} is not a field (value {shown(key, value)}): --help lists all")
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(sentence(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file with a mapping at its top level.

    Raises:
        ConfigError: the file cannot be read or holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `section: {{field: value}}` pairs, not {values!r}")
    return values


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, field by field; `high` overrides `low`. Lists are not merged."""
    merged = dict(low)
    for key, value in high.items():
        are_sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if are_sections else value
    return merged


def _with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and where they name a preset its values for the fields that they leave out."""
    if "preset" not in values:
        return dict(values)
    path = PACKAGE / "presets" / f"{values['preset']}.yaml"
    # An unknown name is left to the validation, which lists the known ones.
    is_known = path in (PACKAGE / "presets").glob("*.yaml")
    return merge(read_yaml(path), values) if is_known else dict(values)


def base(config: str | None, resume: bool, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read the file whose values the command line overrides.

    Args:
        config: the file of `--config`; None for the run's own with `resume`, else the quickstart's.
        resume: whether to continue an earlier run.
        fields: the fields of the command line, of which `name` and `runs` say where that run is.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    if config is None and resume:
        if "name" not in fields:
            raise ConfigError("--resume needs --name=NAME, the run to go on with, or --config FILE")
        runs = runs_folder(str(fields.get("runs", "runs")))
        saved = Path(runs) / str(fields["name"]) / "config.yaml"
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
    """A parser that knows every option and field, for the help and for completion in a shell."""
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
    """The type of a field as the help shows it, from pydantic's notation, such as {int,auto}."""
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
    """A parser of the command's options that are not fields of the configuration."""
    parser = SentenceParser(HINT, add_help=False)
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
        "samples of fields (docs/howto/sweeps.md)",
    )
    # For the processes of a sweep's trials.
    parser.add_argument("--stop-with-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--json", action="store_true", help="with --sweep: print the comparison as JSON"
    )
    return parser


def _source_parser(parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    """A parser to which pydantic adds the fields."""
    return SentenceParser(
        HINT,
        prog="python -m b2ray.run",
        usage="%(prog)s [--config FILE] [--resume] [--section.field=value ...]",
        parents=list(parents),
        description=f"{Config.__doc__} The defaults shown are b2ray's own; the preset's, the "
        "file's and the command line's values go over them, in this order.",
    )


def _command_line(argv: Sequence[str]) -> dict[str, Any]:
    """The nested values of words of the form --section.field=value, unvalidated."""
    try:
        source = CliSettingsSource[Any](
            Config, root_parser=_source_parser(), cli_parse_args=updated_words(argv), **_STYLE
        )
        return dict(source())
    except SettingsError as error:
        raise ConfigError(f"{error} ({HINT})") from error


def sentence(error: ValidationError) -> str:
    """Describe the first problem in one sentence, with the field, its value and the remedy."""
    problem, *later_problems = error.errors()
    field = _field(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{message}"
    if problem["type"] == "missing":
        return f"{field} is missing: set it in the file or with --{field}=…"
    if problem["type"] == "extra_forbidden":
        return f"{field} is not a field (value {shown(field, problem['input'])}): --help lists all"
    # If a field may be of several types, there is one problem for each of them.
    alternatives = (
        e["msg"] for e in later_problems if f"{_field(e['loc'])}.".startswith(f"{field}.")
    )
    messages = dict.fromkeys([message, *alternatives])
    reasons = ", or ".join(m[0].lower() + m[1:] for m in messages)
    return f"{field} is {shown(field, problem['input'])}: {reasons}"


def _field(loc: Sequence[int | str]) -> str:
    """The dotted name of a field, without pydantic's names of the types that it may have."""
    return ".".join(str(part) for part in loc if str(part).isidentifier() or isinstance(part, int))
