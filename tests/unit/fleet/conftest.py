"""Ray's objects by hand."""

from __future__ import annotations

import pytest
import ray


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
