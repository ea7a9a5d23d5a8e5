"""The measured figures of a build, in one JSON file per stage, which the card shows."""

from __future__ import annotations

import json
from typing import Any

from tools.shapes.common import Settings, write_text


def record(settings: Settings, stage: str, values: dict[str, Any]) -> None:
    """Write the figures of a stage to ``facts/<stage>.json``."""
    write_text(settings.facts / f"{stage}.json", json.dumps(values, indent=1) + "\n")


def read(settings: Settings, stage: str) -> dict[str, Any]:
    """Read the figures of a stage, which are empty if the stage has not run."""
    path = settings.facts / f"{stage}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
