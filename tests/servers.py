"""A real MLflow server for tests: a process of its own, on loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.processes import free_port
from tests.runner import when

STARTS_WITHIN = 240.0  # seconds


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int = 0) -> Iterator[str]:
    """MLflow's server with its store and artifacts in a folder; yields its address.

    Another one in the same folder goes on where the first was.
    """
    address = f"http://127.0.0.1:{port or free_port()}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
        *("--port", address.rpartition(":")[2], "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        when(lambda: _answers(address) or process.poll() is not None, within=STARTS_WITHIN)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
