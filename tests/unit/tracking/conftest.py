"""An MLflow store of each test's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest


@pytest.fixture
def runs_with_store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with an empty store, where b2ray looks for it."""
    # Set here, so that what MlflowLog sets is taken back; no retries, so that tests are quick.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copy(empty_store, runs / "mlflow.db")
    return runs


@pytest.fixture
def client(runs_with_store: Path) -> Iterator[mlflow.MlflowClient]:
    yield mlflow.MlflowClient(f"sqlite:///{runs_with_store / 'mlflow.db'}")
    mlflow.set_tracking_uri(None)  # where a test has set it
