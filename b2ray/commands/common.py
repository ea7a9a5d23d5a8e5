"""What the commands share: errors in one sentence, and output that is whole or not there."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from b2ray.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED, ConfigError
from b2ray.options import runs_folder


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help lists all options)")


def add_run(parser: argparse.ArgumentParser, stages: bool = True) -> None:
    """The arguments that say which run, and which of its stages."""
    parser.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    parser.add_argument(
        "--runs",
        default="runs",
        type=runs_folder,
        metavar="FOLDER",
        help="where names are looked up",
    )
    if not stages:
        return
    parser.add_argument(
        "--stage",
        type=int,
        metavar="N",
        help="a committed stage that is still kept (default: the last)",
    )


def execute(
    parser: argparse.ArgumentParser,
    action: Callable[[argparse.Namespace], None],
    argv: Sequence[str],
) -> int:
    """Parse and act; errors become a sentence and an exit code of `b2ray.errors`."""
    try:
        action(parser.parse_args(argv))
    except ConfigError as error:
        print(f"b2ray: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except OSError as error:  # a disk that is full, a folder that is read-only
        print(f"b2ray: a file cannot be used: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("b2ray: stopped", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_DONE


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
