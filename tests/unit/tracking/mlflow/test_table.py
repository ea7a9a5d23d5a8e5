"""The evaluation as a table that MLflow reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image

from b2ray.tracking.folder import RunFolder
from b2ray.tracking.mlflow import table as mlflow_table
from b2ray.tracking.show import cut
from tests.unit.report.runs import PROMPTS, settings, write_run

KEPT = 4  # pictures of each prompt set, as `settings` has it


@pytest.fixture
def run_id(client: mlflow.MlflowClient) -> str:
    return client.create_run("0").info.run_id


def sent(
    client: mlflow.MlflowClient, run_id: str, runs: Path, steps: tuple[int, ...], **over: Any
) -> tuple[RunFolder, Any]:
    """A run's folder, and the table that MLflow has after it was sent at these stages."""
    folder = write_run(settings(runs, **over))
    for step in steps:
        assert mlflow_table.is_due(folder, step)
        mlflow_table.send(client, run_id, folder, step)
    mlflow.set_tracking_uri(client.tracking_uri)
    return folder, mlflow.load_table(mlflow_table.FILE, run_ids=[run_id])


def pictures(client: mlflow.MlflowClient, run_id: str) -> list[str]:
    return sorted(a.path for a in client.list_artifacts(run_id, mlflow_table.PICTURES))


def test_before_the_first_stage_it_has_what_there_is(client, run_id, runs_with_store):
    folder, table = sent(client, run_id, runs_with_store, (0,))
    assert list(table.columns) == [
        *("prompt", "before"),
        *("clip before", "judge before"),  # the sum of one reward says the same as that
        *("prompts", "seed", "number"),
    ]
    assert len(table) == 2 * KEPT
    first = table.iloc[0]
    assert (first["prompt"], first["prompts"]) == (PROMPTS[0], "train")
    assert (first["seed"], first["number"]) == (0, 0)
    assert first["clip before"] == pytest.approx(folder.scores(0, "train")["clip"][0], abs=1e-6)


def test_at_the_end_the_same_seeds_stand_side_by_side(client, run_id, runs_with_store, tmp_path):
    folder, table = sent(client, run_id, runs_with_store, (0, 6))
    assert list(table.columns) == [
        *("prompt", "before", "after"),
        *("clip before", "clip after", "judge before", "judge after"),
        *("prompts", "seed", "number"),
    ]
    row = table[table["prompts"] == "heldout"].iloc[2]
    assert row["judge after"] == pytest.approx(folder.scores(6, "heldout")["judge"][2], abs=1e-6)
    # A picture of 32 pixels is enlarged by whole pixels.
    file = client.download_artifacts(run_id, row["after"]["filepath"], str(tmp_path))
    shown = np.asarray(Image.open(file))
    assert shown.shape == (128, 128, 3)
    assert np.array_equal(shown[::4, ::4], cut(folder.strip(6, "heldout"), KEPT)[2])
    assert row["before"]["filepath"] != row["after"]["filepath"]


def test_sent_again_it_is_the_same(client, run_id, runs_with_store):
    _, table = sent(client, run_id, runs_with_store, (0, 6))
    files = pictures(client, run_id)
    assert len(files) == 2 * 2 * KEPT
    _, again = sent(client, run_id, runs_with_store, (0, 6, 6))
    assert again.equals(table) and pictures(client, run_id) == files


def test_a_run_that_keeps_no_pictures_has_no_table(client, run_id, runs_with_store):
    evaluation = {"every": 2, "previews": 0}
    folder = write_run(settings(runs_with_store, evaluation=evaluation))
    mlflow_table.send(client, run_id, folder, 0)
    assert not client.list_artifacts(run_id)


def test_evaluations_in_between_are_not_due(runs_with_store):
    folder = write_run(settings(runs_with_store))
    assert [s for s in range(7) if mlflow_table.is_due(folder, s)] == [0, 6]
