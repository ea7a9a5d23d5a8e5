"""Logs the evaluations as a table in MLflow: pictures and scores before and after the run."""

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
ROWS = 64  # the most that each prompt set has
SMALLEST = 128  # pixels; smaller pictures are enlarged by an integer factor


def is_due(folder: RunFolder, step: int) -> bool:
    """Return whether a stage is the first or the last of the table and has been evaluated."""
    return step in (0, folder.config.curriculum.stages) and folder.evaluated(step, SETS[0])


def send(client: Any, run_id: str, folder: RunFolder, step: int) -> None:
    """Write the table as it is after a stage, and replace the one that MLflow has.

    It has the format that `mlflow.load_table` reads, under fixed names. `log_table` would add rows
    and pictures to those that an earlier try has sent.

    Args:
        client: an `MlflowClient`.
        run_id: the MLflow run.
        folder: the run's folder.
        step: the number of the stage, for which `is_due` holds.
    """
    steps = (0,) if step == 0 else (0, step)
    columns: list[str] = []
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in SETS:
            columns, set_rows = _table_of(folder, name, steps, Path(temporary)) or (columns, [])
            rows += set_rows
        if not rows:
            return  # the run keeps no pictures
        client.log_artifacts(run_id, temporary, PICTURES)
    client.log_dict(run_id, {"columns": columns, "data": rows}, FILE)
    # MLflow's page finds its tables by this tag.
    table = [{"path": FILE, "type": "table"}]
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(table))


def _table_of(
    folder: RunFolder, name: str, steps: Sequence[int], temporary: Path
) -> tuple[list[str], list[list[Any]]] | None:
    """Return the columns and rows of a prompt set, and write its pictures into `temporary`.

    Returns None if the run keeps no pictures of the set.
    """
    previews = folder.config.evaluation.previews
    if not previews or not all(
        folder.evaluated(s, name) and folder.strip(s, name).is_file() for s in steps
    ):
        return None
    prompts = folder.prompts(0, name)
    in_strip = min(previews, len(prompts))
    count = min(in_strip, ROWS)
    when = WHEN[: len(steps)]
    scores = [folder.scores(s, name) for s in steps]
    rewards = [r for r in scores[0] if not _says_the_same(r, scores[0])]
    for step, which in zip(steps, when, strict=True):
        for i, picture in enumerate(cut(folder.strip(step, name), in_strip)[:count]):
            save_png(_enlarged(picture), temporary / f"{name}_{i:03d}_{which}.png")
    # The most important columns come first, because MLflow's page shows the first few only, and
    # groups the rows by the very first.
    columns = ["prompt", *when, *(f"{r} {which}" for r in rewards for which in when)]
    columns += ["prompts", "seed", "number"]
    rows = []
    for i in range(count):
        files = (f"{PICTURES}/{name}_{i:03d}_{which}.png" for which in when)
        pictures = [{"type": "image", "filepath": f, "compressed_filepath": f} for f in files]
        figures = [round(float(table[r][i]), 6) for r in rewards for table in scores]
        rows.append([prompts[i], *pictures, *figures, name, folder.config.seed, i])
    return columns, rows


def _says_the_same(name: str, scores: dict[str, np.ndarray]) -> bool:
    """Return whether `name` is the sum of the rewards and there is only one of them."""
    others = (v for k, v in scores.items() if k != name)
    return name == "reward" and any(np.array_equal(scores[name], v) for v in others)


def _enlarged(picture: np.ndarray) -> Image.Image:
    height, width = picture.shape[:2]
    scale = max(1, round(SMALLEST / max(height, width)))
    size = width * scale, height * scale
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
