"""A run that is tracked by a real MLflow server over HTTP, also by one that is away for a while."""

from __future__ import annotations

import io
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from b2ray.config.load import parse
from b2ray.errors import EXIT_DONE, EXIT_STOPPED
from b2ray.tracking.folder import RunFolder
from b2ray.tracking.mlflow.log import MlflowLog
from tests.models import PROMPTS, arguments
from tests.processes import free_port
from tests.runner import ColdRunner, Runner, when
from tests.servers import mlflow_server

pytestmark = pytest.mark.cold  # its server
OPTIONS = {"fleet__samplers__max": 1, "tracking__system": 0.5, "tracking__register_as": "small"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture(scope="module")
def tracked(runner: Runner, server: str) -> str:
    """The name of a run that the server has."""
    assert runner.here("tracked", tracking__uri=server, **OPTIONS) == EXIT_DONE
    return "tracked"


def found_run(server: str, name: str) -> mlflow.entities.Run:
    """The only run of a name."""
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("b2ray").experiment_id
    text = f"attributes.run_name = '{name}'"
    (run,) = client.search_runs([experiment], filter_string=text)
    return run


def artifacts(client: mlflow.MlflowClient, run_id: str, folder: str = "") -> list[str]:
    """Every file of a run."""
    found: list[str] = []
    for entry in client.list_artifacts(run_id, folder or None):
        found += artifacts(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return sorted(found)


def test_runs_can_be_searched_by_tags_and_parameters(server: str, tracked: str) -> None:
    client = mlflow.MlflowClient(server)
    for text in (
        "tags.`b2ray.preset` = 'b2'",
        "tags.`b2ray.rewards` = 'clip'",
        "params.`rewards.clip.weight` = '1.0'",
        "params.`branching.branches` = '3' and metrics.`cost/reward_queries` = 36",
    ):
        experiment = client.get_experiment_by_name("b2ray").experiment_id
        names = {r.info.run_name for r in client.search_runs([experiment], filter_string=text)}
        assert tracked in names, text
    run = found_run(server, tracked)
    assert run.info.status == "FINISHED"
    assert "training prompts" in run.data.tags["mlflow.note.content"]


def test_it_has_how_busy_the_machine_was(server: str, tracked: str) -> None:
    run = found_run(server, tracked)
    name = "system/node_0/system_memory_usage_percentage"
    history = mlflow.MlflowClient(server).get_metric_history(run.info.run_id, name)
    assert len(history) >= 2 and all(0 < m.value < 100 for m in history)
    per_moment = Counter(m.timestamp // 500 for m in history)
    assert max(per_moment.values()) == 1  # four workers and the driver read the same machine


def test_it_has_the_evaluation_as_a_table(server: str, tracked: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(server)
    try:
        info = found_run(server, tracked).info
        client = mlflow.MlflowClient(server)
        table = client.load_table(info.experiment_id, "evaluation.json", [info.run_id])
    finally:
        mlflow.set_tracking_uri(None)
    assert set(table["prompt"]) <= set(PROMPTS) and {"clip before", "clip after"} <= set(table)
    for cell in table.iloc[0][["before", "after"]]:
        file = client.download_artifacts(info.run_id, cell["filepath"], str(tmp_path))
        assert Image.open(file).size[0] >= 96


def test_the_registered_lora_loads_and_draws(server: str, tracked: str) -> None:
    mlflow.set_tracking_uri(server)
    try:
        model = mlflow.pyfunc.load_model("models:/small/1")
        size = {"height": 16, "width": 16}  # steps and guidance are the run's by the signature
        (png,) = model.predict({"prompt": [PROMPTS[0]]}, params=size)
        pipe = mlflow.diffusers.load_model("models:/small/1").load_pipeline(device="cpu")
        example = model.input_example
    finally:
        mlflow.set_tracking_uri(None)
    assert Image.open(io.BytesIO(png)).size == (16, 16)
    picture = pipe(PROMPTS[0], num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(picture).all() and picture.std() > 0
    assert example["prompt"][0] in PROMPTS
    assert model.metadata.signature.inputs.input_names() == ["prompt"]


def test_sent_again_nothing_changes(runner: Runner, server: str, tracked: str) -> None:
    run = found_run(server, tracked)
    client = mlflow.MlflowClient(server)

    def all_there() -> tuple[object, ...]:
        now = client.get_run(run.info.run_id)
        names = ("reward/mean", "system/node_0/cpu_utilization_percentage")
        histories = [
            sorted(
                (m.step, m.timestamp, m.value)
                for m in client.get_metric_history(run.info.run_id, name)
            )
            for name in names
        ]
        versions = client.search_model_versions("name = 'small'")
        return (
            *(now.data.params, now.data.metrics, histories, artifacts(client, run.info.run_id)),
            *([m.model_id for m in now.outputs.model_outputs], len(versions)),
        )

    before = all_there()
    words = arguments(runner.models, runner.runs, tracked, tracking__uri=server, **OPTIONS)
    folder = RunFolder(runner.runs / tracked, parse(words).config)
    log = MlflowLog(folder)
    log._note(run_id=None, sent=-1, system=0, hosts=[])  # as if nothing had been noted
    log.finish("FINISHED", run.data.tags["mlflow.note.content"])
    assert log.closed and log.run_id == run.info.run_id
    assert all_there() == before


@pytest.mark.timeout(1200)  # two starts of the command, two of the server
def test_a_server_that_goes_away_gets_all_in_the_same_run_when_the_run_goes_on(
    runner: Runner, cold_runner: ColdRunner, tmp_path: Path
) -> None:
    port, folder = free_port(), runner.runs / "late"
    address = f"http://127.0.0.1:{port}"
    options = {**OPTIONS, "tracking__uri": address, "curriculum__stages": 30}
    options |= {"evaluation__every": 0}

    def run_id() -> str | None:
        file = folder / "mlflow.json"
        return json.loads(file.read_text())["run_id"] if file.exists() else None

    with mlflow_server(tmp_path, port):
        process = cold_runner.process("late", **options)
        try:
            when(lambda: run_id() is not None, within=300)
        except BaseException:
            process.kill()
            raise
    first, away = run_id(), runner.lines("late")
    try:
        when(lambda: runner.lines("late") >= away + 3, within=300)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait(30)
    assert process.returncode in (EXIT_STOPPED, EXIT_DONE), out
    assert "does not take figures" in out
    with mlflow_server(tmp_path, port):
        assert runner.here("late", "--resume", **options) == EXIT_DONE
        run = found_run(address, "late")
        assert run.info.run_id == first
        history = mlflow.MlflowClient(address).get_metric_history(first, "reward/mean")
        assert sorted(m.step for m in history) == [*range(1, 31)]
        assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1
        files = artifacts(mlflow.MlflowClient(address), first)
        assert {"evaluation.json", "report.html"} <= set(files)
