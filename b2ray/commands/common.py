"""What the commands share: parsing arguments, reporting errors, writing output atomically."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from b2ray.cli import guarded
from b2ray.config import Config, Sampling
from b2ray.config.arguments import SentenceParser
from b2ray.config.load import parse, sentence
from b2ray.config.paths import runs_folder
from b2ray.errors import EXIT_DONE, ConfigError


class Lines(argparse.HelpFormatter):
    """Keeps the line breaks of descriptions and examples, and wraps lines that are too long."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
            for line in text.splitlines()
        )


class CommandParser(SentenceParser):
    """The argument parser of a command, whose errors are single sentences.

    Args:
        fields: whether arguments that it does not know are fields of a configuration. They are
            returned as `fields` of the namespace, for `b2ray.config.load` to read.
        **more: arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *, fields: bool = False, **more: Any) -> None:
        super().__init__(f"{more['prog']} --help lists all options", formatter_class=Lines, **more)
        self._takes_fields = fields
        if fields:
            self.add_argument_group(
                "fields of the configuration",
                "Any of them may be given as --section.field=value, such as "
                "--fleet.samplers.max=4; b2ray run --help explains them all.",
            )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, and put the fields of a configuration into `namespace.fields`."""
        words = list(sys.argv[1:] if args is None else args)
        # Fields are taken out first, because argparse takes --field=value for a positional argument
        # if the value has a space.
        fields = [w for w in words if self._is_field(w)]
        namespace, rest = self.parse_known_args([w for w in words if w not in fields], namespace)
        if rest and not self._takes_fields:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        namespace.fields = [*fields, *rest]
        return namespace

    def _is_field(self, word: str) -> bool:
        name, equals, _ = word.partition("=")
        known = name in self._option_string_actions
        return self._takes_fields and word.startswith("--") and bool(equals) and not known


def add_run(parser: argparse.ArgumentParser, stages: bool = True) -> None:
    """Add the arguments that say which run, and with `stages` also which of its stages."""
    parser.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    add_runs(parser)
    if not stages:
        return
    parser.add_argument(
        "--stage",
        type=int,
        metavar="N",
        help="a committed stage that is still kept (default: the last)",
    )


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says where runs are."""
    parser.add_argument(
        "--runs",
        default="runs",
        type=runs_folder,
        metavar="FOLDER",
        help="the folder of all runs, where names are looked up (default: runs)",
    )


def configuration(args: argparse.Namespace) -> Config:
    """Read the configuration of --config, or else the quickstart's, and override its fields.

    Args:
        args: the parsed command line, with `config` and `fields`.

    Raises:
        ConfigError: the file or a field is wrong.
    """
    file = [f"--config={args.config}"] if args.config else []
    return parse([*file, *args.fields]).config


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for programs that read the output."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document on standard output, for programs, and all else on standard "
        'error; if it fails: {"error": sentence}',
    )


def execute(
    parser: argparse.ArgumentParser,
    action: Callable[[argparse.Namespace], Mapping[str, Any]],
    argv: Sequence[str],
    verdict: Callable[[Mapping[str, Any]], int] = lambda _: EXIT_DONE,
) -> int:
    """Parse the command line and run a command; errors become a sentence and an exit code.

    Args:
        parser: the command's parser.
        action: runs the command and prints its results; returns what --json prints instead.
        argv: the command line.
        verdict: returns the exit code for what the action has returned.

    Returns:
        The exit code, one of `b2ray.errors`.
    """
    as_json = "--json" in argv
    document: Mapping[str, Any] = {}

    def act() -> int:
        nonlocal document
        with stdout_to_stderr() if as_json else contextlib.nullcontext():
            document = action(parser.parse_args(argv))
        return verdict(document)

    def note(sentence: str) -> None:
        nonlocal document
        document = {"error": sentence}

    code = guarded(act, note)
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    return code


def stdout_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Return a context in which everything that is printed goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


def whole(least: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def add_prompts(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Add the argument that names a prompt set.

    Args:
        parser: the command's parser.
        **more: further arguments of `add_argument`.
    """
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts (.txt, one a line; .jsonl or .csv with `prompt`), or a built-in "
        "set such as template1.test or animals",
        **more,
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how pictures are sampled."""
    parser.add_argument("--steps", type=int, metavar="T", help="denoising steps")
    parser.add_argument(
        "--guidance", type=float, metavar="W", help="classifier-free guidance scale"
    )
    parser.add_argument(
        "--eta", type=float, metavar="X", help="noise of the steps: 1 as in training, 0 none"
    )


def with_sampling(config: Config, args: argparse.Namespace) -> Config:
    """Return the configuration with the options of `add_sampling` applied.

    It is not validated as a whole, because pictures can be sampled without noise (eta 0), although
    nothing can be trained like that.

    Args:
        config: the configuration.
        args: the parsed command line.

    Raises:
        ConfigError: a value is out of its range.
    """
    options = {f: getattr(args, f) for f in ("steps", "guidance", "eta")}
    options = {field: value for field, value in options.items() if value is not None}
    try:
        sampling = Sampling(**{**config.sampling.model_dump(), **options})
    except ValidationError as error:
        raise ConfigError(f"--{sentence(error)}") from error
    return config.model_copy(update={"sampling": sampling})


def numbered(folder: Path) -> Path:
    """Return the next numbered subfolder, which does not exist yet, such as 003 after 002."""
    numbers = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    return folder / f"{max(numbers, default=0) + 1:03d}"


def quiet() -> None:
    """Let diffusers and transformers log errors only; their warnings are for programmers."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()


def refuse_existing(output: Path, force: bool) -> None:
    """Refuse to replace an existing output.

    Args:
        output: a file or a folder.
        force: allows to replace a file, or a folder that has a pipeline in it.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """
    if not output.exists():
        return
    if not force:
        raise ConfigError(f"{output} exists: give another --output, or --force to replace it")
    if output.is_dir() and not (output / "model_index.json").is_file():
        raise ConfigError(f"{output} is a folder but no pipeline, --force does not delete it")


def place(output: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder under another name, then rename it.

    Args:
        output: the file or folder, which is replaced if it exists.
        write: writes to the path that it is called with.

    Raises:
        ConfigError: the disk refuses; what was at `output` is unchanged.
    """
    part = output.with_name(output.name + ".part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        write(part)
        if output.is_dir():
            _remove(output)
        part.replace(output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{output} cannot be written: {error}") from error
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.is_file():
        path.unlink()
