"""``python -m tools.shapes`` trains the embedded models and writes the prompt files.

It is started from the root of the repository. Stages run as processes of one thread each, two at a
time, as soon as the stages that they need are done.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from b2ray.shapes import WEIGHTS
from tools.shapes.common import Settings

# stage → the stages whose results it reads
STAGES: dict[str, tuple[str, ...]] = {
    "vae": (),
    "text": (),
    "unet": ("vae", "text"),
    "reward": ("vae",),
    "aesthetic": ("vae",),
    "imagereward": ("unet",),
    "prompts": (),
    "evaluate": ("unet", "reward"),
    "benchmark": ("unet", "reward"),
    "card": ("evaluate", "benchmark", "prompts", "aesthetic", "imagereward"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one stage in this process or several as child processes, and return the exit code."""
    args = make_parser().parse_args(arguments)
    stages = args.only.split(",") if args.only else list(STAGES)
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        print(f"Unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    if len(stages) == 1:
        settings = Settings(args.out.resolve(), args.seed, args.scale)
        importlib.import_module(f"tools.shapes.{stages[0]}").build(settings)
        return 0
    options = ["--out", str(args.out), "--seed", str(args.seed), "--scale", str(args.scale)]
    return _run(stages, options, args.jobs)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.shapes",
        description="Train the embedded model, its rewards and its prompt files from nothing; its "
        "card (b2ray/shapes/weights/README.md) has how long each stage takes. Stages run as "
        "processes of one thread each, as soon as those they need are done.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=WEIGHTS,
        metavar="FOLDER",
        help="the folder for the weights (default: the package's own, which are replaced)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of everything random (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        metavar="STAGES",
        help=f"these stages alone, with commas between: {', '.join(STAGES)}",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="stages at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on steps and pictures, to try the code in seconds (default: %(default)s)",
    )
    return parser


def _run(stages: list[str], options: list[str], jobs: int) -> int:
    """Run stages in child processes, at most ``jobs`` at a time; stop all if one fails."""
    waiting, running = list(stages), dict[str, subprocess.Popen[bytes]]()
    free_rows = list(range(jobs))  # lines of the terminal for the children's progress bars
    row_of: dict[str, int] = {}
    try:
        while waiting or running:
            for name in [n for n in waiting if _ready(n, waiting, running)][: len(free_rows)]:
                waiting.remove(name)
                row_of[name] = free_rows.pop(0)
                running[name] = _start(name, options, row_of[name])
            time.sleep(0.2)
            for name in [n for n, child in running.items() if child.poll() is not None]:
                code = running.pop(name).returncode
                free_rows.append(row_of[name])
                if code:
                    print(f"Stage {name} failed with exit code {code}.", file=sys.stderr)
                    return 1
    finally:
        for child in running.values():
            child.terminate()
    return 0


def _ready(name: str, waiting: list[str], running: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Whether the stages that a stage needs are done, or are not part of this run."""
    return not any(need in waiting or need in running for need in STAGES[name])


def _start(name: str, options: list[str], row: int) -> subprocess.Popen[bytes]:
    """Start a stage in a child process, whose progress bar is in this row of the terminal."""
    command = [sys.executable, "-m", "tools.shapes", "--only", name, *options]
    # On two cores, two processes of one thread each do nearly twice the work of one such process,
    # while one process with two threads does only one and a half times. tqdm reads TQDM_POSITION.
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_POSITION": str(row)}
    )


if __name__ == "__main__":
    sys.exit(main())
