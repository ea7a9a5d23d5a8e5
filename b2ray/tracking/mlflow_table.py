"""The evaluation as a table in MLflow: prompt, seed, pictures and scores before and after."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from b2ray.tracking.folder import RunFolder
from b2ray.tracking.show import cut, save_png

FILE = "evaluation.json"
PICTURES = "evaluation_pictures"
SETS = ("train", "heldout")
WHEN = ("before", "after")
ROWS = 64  # of each prompt set, at the most
SMALLEST = 128  # pixels; smaller pictures are enlarged by whole pixels to be seen


def is_due(folder: RunFolder, step: int) -> bool:
    """Whether the table has news with this stage: it is the first or the last, and was seen to."""
    return step in (0, folder.config.curriculum.stages) and folder.evaluated(step, SETS[0])


def send(client: Any, run_id: str, folder: RunFolder, step: int) -> None:
    """Write the table as it is after a stage that `is_due`, over what is there.

    In MLflow's form for `mlflow.load_table`, but with names that do not change: `log_table` would
    add rows and pictures to those that an earlier try has sent.
    """
    steps = (0,) if step == 0 else (0, step)
    columns: list[str] = []
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as beside:
        for name in SETS:
            columns, more = _of(folder, name, steps, Path(beside)) or (columns, [])
            rows += more
        if not rows:
            return  # no pictures are kept
        client.log_artifacts(run_id, beside, PICTURES)
    client.log_dict(run_id, {"columns": columns, "data": rows}, FILE)
    # By this MLflow finds its tables.
    table = [{"path": FILE, "type": "table"}]
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(table))


def _of(
    folder: RunFolder, name: str, steps: Sequence[int], beside: Path
) -> tuple[list[str], list[list[Any]]] | None:
    """Columns and rows of a prompt set, its pictures written to `beside`; None if none are kept."""
    previews = folder.config.evaluation.previews
    if not previews or not all(
        folder.evaluated(s, name) and folder.strip(s, name).is_file() for s in steps
    ):
        return None
    prompts = folder.prompts(0, name)
    held = min(previews, len(prompts))
    count = min(held, ROWS)
    when = WHEN[: len(steps)]
    scores = [folder.scores(s, name) for s in steps]
    rewards = [r for r in scores[0] if not _says_the_same(r, scores[0])]
    for step, which in zip(steps, when, strict=True):
        for i, picture in enumerate(cut(folder.strip(step, name), held)[:count]):
            save_png(_enlarged(picture), beside / f"{name}_{i:03d}_{which}.png")
    # MLflow's page shows the first columns and groups by the first.
    columns = ["prompt", *when, *(f"{r} {which}" for r in rewards for which in when)]
    columns += ["prompts", "seed", "number"]
    rows = []
    for i in range(count):
        files = (f"{PICTURES}/{name}_{i:03d}_{which}.png" for which in when)
        shown = [{"type": "image", "filepath": f, "compressed_filepath": f} for f in files]
        figures = [round(float(found[r][i]), 6) for r in rewards for found in scores]
        rows.append([prompts[i], *shown, *figures, name, folder.config.seed, i])
    return columns, rows


def _says_the_same(name: str, scores: dict[str, np.ndarray]) -> bool:
    """Whether this is a sum of rewards that has one member."""
    others = (v for k, v in scores.items() if k != name)
    return name == "reward" and any(np.array_equal(scores[name], v) for v in others)


def _enlarged(picture: np.ndarray) -> Image.Image:
    height, width = picture.shape[:2]
    scale = max(1, round(SMALLEST / max(height, width)))
    size = width * scale, height * scale
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
