"""A store of MLflow that may be away: its client, and runs that are found again by a key."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from b2ray.discretion import masked

SETTINGS = {
    # Without these a server that is away holds a stage up for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
TABLES_WITHIN = 60.0  # seconds for another process to make the tables of a new store
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # its page opens with the runs


def prepare() -> None:
    """Settings of MLflow for this process, where the user has none."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def client_of(uri: str) -> Any:
    """A client of the store, without its news."""
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # migrations are no news
    with _alone(uri):
        return mlflow.MlflowClient(uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time opens a SQLite store of this machine.

    MLflow makes the tables of a new one, then brings them up to date; a second process that comes
    in between is told to make a backup and to upgrade.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not file.parent.is_dir():
        yield
        return
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    # What is wrong there the store itself will say; some file systems have no locks.
    with suppress(Timeout, OSError, NotImplementedError):
        lock.acquire(timeout=TABLES_WITHIN)
    try:
        yield
    finally:
        lock.release()


def run_of(client: Any, experiment: str, artifacts: str | None, key: str, name: str) -> Any:
    """The run with this key, which may have been made by a process that died before it noted the
    id; else a new one.

    Args:
        experiment: its name; made if it is not there.
        artifacts: where a new experiment keeps its artifacts; None leaves it to the server.
        key: its tag `b2ray.key`.
        name: of a new run.
    """
    there = client.get_experiment_by_name(experiment)
    if there:
        place = there.experiment_id
    else:
        place = client.create_experiment(experiment, artifacts, EXPERIMENT)
    known = client.search_runs([place], filter_string=f"tags.`b2ray.key` = '{key}'")
    return known[0] if known else client.create_run(place, run_name=name, tags={"b2ray.key": key})


def reason(error: Exception) -> str:
    """What a store's fault says, in one line without secrets."""
    return masked(" ".join(str(error).split()))[:200]
