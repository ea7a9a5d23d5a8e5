"""What the tests of several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, which take seconds to make."""
    import mlflow

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def objects(monkeypatch) -> set[object]:
    """Every ref has a value and every value a ref, but for the refs in this set, which are lost."""
    lost: set[object] = set()

    def get(refs, timeout=None):
        if lost & set(refs):
            raise ray.exceptions.ObjectLostError("00", "", "")
        return [f"value of {ref}" for ref in refs]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "put", lambda value: f"own {value}")
    return lost
