"""Where files and runs are, as seen from the working directory, the package and a Ray job."""

from __future__ import annotations

import os
from pathlib import Path

from b2ray.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.yaml"


def find(path: str) -> Path | None:
    """Find a file or folder, relative to the working directory or to where b2ray is installed.

    Returns:
        The first of these places that exists; None if none does.
    """
    expanded = Path(os.path.expanduser(path))
    places = [expanded, PACKAGE.parent / expanded, PACKAGE / expanded]
    # Unlike Path.exists, this says no to a name that is too long for the disk.
    return next((p for p in places if os.path.exists(p)), None)


def in_job_copy() -> bool:
    """Whether the working directory is a copy that Ray made for a job and will delete."""
    return "working_dir_files" in Path.cwd().parts


def runs_folder(runs: str) -> str:
    """The folder of all runs.

    A relative folder is below the working directory. If that is a job's copy, where the runs would
    be deleted with it, the folder is below $B2RAY_HOME, or without that below the home folder on
    the job's machine.

    Args:
        runs: the field `runs`, or the option `--runs`.

    Raises:
        ConfigError: the folder cannot be made absolute.
    """
    try:
        path = Path(runs).expanduser()
        if path.is_absolute() or not in_job_copy():
            return str(path)
        home = Path(os.environ.get("B2RAY_HOME") or Path.home())
    except RuntimeError as error:
        raise ConfigError(f"runs is {runs!r} but there is no home folder: make it absolute") from (
            error
        )
    if not home.is_absolute():
        raise ConfigError(f"B2RAY_HOME is {str(home)!r}, not an absolute folder: make it one")
    return str(home / path)
