"""Access to an MLflow store that may not answer: its client, and runs found by a key."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from b2ray.config.secrets import masked

SETTINGS = {
    # By default MLflow waits and retries for minutes if a server does not answer.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
TABLES_WITHIN = 60.0  # seconds for another process to make the tables of a new store
# With this tag an experiment's page opens with the list of its runs.
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}


def prepare() -> None:
    """Set MLflow's environment variables for this process, unless the user has set them."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def client_of(uri: str) -> Any:
    """Return an `MlflowClient` of a store, and silence what MLflow logs about its own database."""
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _alone(uri):
        return mlflow.MlflowClient(uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let one process at a time open a SQLite store of this machine.

    MLflow first makes the tables of a new store, then migrates them to its newest version. A second
    process that opens the store in between gets an error that asks for a backup and an upgrade.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not file.parent.is_dir():
        yield
        return
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    # Some file systems have no locks; if the folder cannot be written, the store will say so.
    with suppress(Timeout, OSError, NotImplementedError):
        lock.acquire(timeout=TABLES_WITHIN)
    try:
        yield
    finally:
        lock.release()


def run_of(client: Any, experiment: str, artifacts: str | None, key: str, name: str) -> Any:
    """Find the MLflow run with a key, or create it.

    The run exists if a process died after it had created it and before it noted the id.

    Args:
        client: an `MlflowClient`.
        experiment: the experiment's name; it is created if there is none.
        artifacts: where a new experiment keeps its artifacts; None leaves it to the server.
        key: the value of the run's tag `b2ray.key`.
        name: the name of a new run.
    """
    existing = client.get_experiment_by_name(experiment)
    if existing:
        identity = existing.experiment_id
    else:
        identity = client.create_experiment(experiment, artifacts, EXPERIMENT)
    runs = client.search_runs([identity], filter_string=f"tags.`b2ray.key` = '{key}'")
    return runs[0] if runs else client.create_run(identity, run_name=name, tags={"b2ray.key": key})


def reason(error: Exception) -> str:
    """Return the message of a store's error as one line, without secrets and shortened."""
    return masked(" ".join(str(error).split()))[:200]
