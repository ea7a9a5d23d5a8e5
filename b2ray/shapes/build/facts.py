"""Measured figures of a build: one JSON file per stage, read by the card."""

from __future__ import annotations

import json
from typing import Any

from b2ray.shapes.build.common import Settings, write_text


def record(settings: Settings, stage: str, values: dict[str, Any]) -> None:
    """Writes ``facts/<stage>.json``."""
    write_text(settings.facts / f"{stage}.json", json.dumps(values, indent=1) + "\n")


def read(settings: Settings, stage: str) -> dict[str, Any]:
    """Reads ``facts/<stage>.json``; empty if the stage has not run."""
    path = settings.facts / f"{stage}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
