"""What the commands share: errors in one sentence, and output that is whole or not there."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from safetensors import SafetensorError

from b2ray.config import Config, Sampling
from b2ray.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_WORKER,
    ConfigError,
    Stopped,
    WorkerError,
)
from b2ray.options import parse, runs_folder, sentence


class Lines(argparse.HelpFormatter):
    """Descriptions and examples keep their lines; what is too long is wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
            for line in text.splitlines()
        )


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one sentence instead of a page of usage.

    Args:
        fields: whether what it does not know are fields of a configuration, for `b2ray.options`;
            they are put into `fields`.
    """

    def __init__(self, *, fields: bool = False, **more: Any) -> None:
        super().__init__(**more, allow_abbrev=False, formatter_class=Lines)
        self._takes_fields = fields
        if fields:
            self.add_argument_group(
                "fields of the configuration",
                "Any of them may be given as --section.field=value, such as "
                "--fleet.samplers.max=4; b2ray run --help explains them all.",
            )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        # By hand: argparse takes --field=value for a positional if there is a space in the value.
        fields = [w for w in words if self._is_field(w)]
        found, rest = self.parse_known_args([w for w in words if w not in fields], namespace)
        if rest and not self._takes_fields:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        found.fields = [*fields, *rest]
        return found

    def _is_field(self, word: str) -> bool:
        name, equals, _ = word.partition("=")
        known = name in self._option_string_actions
        return self._takes_fields and word.startswith("--") and bool(equals) and not known

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help lists all options)")


def add_run(parser: argparse.ArgumentParser, stages: bool = True) -> None:
    """The arguments that say which run, and which of its stages."""
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
    """The argument that says where runs are."""
    parser.add_argument(
        "--runs",
        default="runs",
        type=runs_folder,
        metavar="FOLDER",
        help="the folder of all runs, where names are looked up (default: runs)",
    )


def configuration(args: argparse.Namespace) -> Config:
    """The configuration in --config, or the quickstart's, with the fields that are given over it.

    Raises:
        ConfigError: the file or a field is wrong.
    """
    file = [f"--config={args.config}"] if args.config else []
    return parse([*file, *args.fields]).config


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option for programs that read the output."""
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
    """Parse and act; errors become a sentence and an exit code of `b2ray.errors`.

    Args:
        action: does it, and says so in words; returns what --json prints instead of them.
        verdict: the exit code for what it returned.
    """
    as_json = "--json" in argv
    try:
        with apart(as_json):
            document = action(parser.parse_args(argv))
        code = verdict(document)
    except (ConfigError, WorkerError, Stopped, OSError, KeyboardInterrupt) as error:
        said, code = _sentence(error), _code(error)
        print(f"b2ray: {said}", file=sys.stderr)
        document = {"error": said}
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    return code


def apart(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """With --json what is printed inside goes to standard error, whoever prints it."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _code(error: BaseException) -> int:
    codes = {WorkerError: EXIT_WORKER, Stopped: EXIT_STOPPED, KeyboardInterrupt: EXIT_STOPPED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_CONFIG)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError):  # a disk that is full, a folder that is read-only
        return f"a file cannot be used: {error}"
    if isinstance(error, Stopped | KeyboardInterrupt):
        return "stopped"
    return str(error)


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def add_prompts(parser: argparse.ArgumentParser, **more: Any) -> None:
    """The argument that names a set of prompts."""
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts (.txt, one a line; .jsonl or .csv with `prompt`), or a built-in "
        "set such as template1.test or animals",
        **more,
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how pictures are denoised."""
    parser.add_argument("--steps", type=int, metavar="T", help="denoising steps")
    parser.add_argument(
        "--guidance", type=float, metavar="W", help="classifier-free guidance scale"
    )
    parser.add_argument(
        "--eta", type=float, metavar="X", help="noise of the steps: 1 as in training, 0 none"
    )


def with_sampling(config: Config, args: argparse.Namespace) -> Config:
    """The configuration with what the command line says of sampling.

    It is not validated as a whole: without noise (eta 0) nothing can be trained, but drawn.

    Raises:
        ConfigError: a value is out of its range.
    """
    given = {f: getattr(args, f) for f in ("steps", "guidance", "eta")}
    given = {field: value for field, value in given.items() if value is not None}
    try:
        sampling = Sampling(**{**config.sampling.model_dump(), **given})
    except ValidationError as error:
        raise ConfigError(f"--{sentence(error)}") from error
    return config.model_copy(update={"sampling": sampling})


def numbered(folder: Path) -> Path:
    """A numbered folder in this one that is not there yet."""
    taken = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    return folder / f"{max(taken, default=0) + 1:03d}"


def quiet() -> None:
    """Let the model libraries speak of errors only: their warnings are for programmers."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()


def refuse_existing(output: Path, force: bool) -> None:
    """Refuse to replace what is there, and at any rate a folder that is no pipeline.

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
    """Let `write` make a file or folder beside `output`, then move it there.

    Raises:
        ConfigError: the disk refuses; what was at `output` stands.
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
