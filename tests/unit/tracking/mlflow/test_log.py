"""MLflow as a copy of the run's folder that may be late, on a real SQLite store."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from b2ray.algorithm.branching import RewardWindow
from b2ray.config import Config, Fleet, Prompts, Reward, Samplers
from b2ray.diffusion import lora_file
from b2ray.tracking.folder import RunFolder, RunState, open_run
from b2ray.tracking.mlflow import log as mlflow_log
from b2ray.tracking.mlflow.log import MlflowLog
from b2ray.tracking.mlflow.names import parameters
from b2ray.tracking.show import save_png

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def folder(runs_with_store) -> RunFolder:
    with open_run(config(runs_with_store)) as found:
        yield found


def config(runs: Path, **over: object) -> Config:
    rewards = (Reward(name="clip", kind="clip"),)
    values = {"prompts": Prompts(train="p.txt"), "rewards": rewards, "runs": str(runs)}
    return Config(**{**values, **over})


def stage_done(folder: RunFolder, stage: int, commit: bool = True) -> None:
    page = folder.pictures / f"step-{stage:05d}" / "preview_train.png"
    save_png(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), page)
    figures = {"reward/mean": stage / 3, "broken": float("nan")}
    folder.append_metrics(stage, figures, [str(page.relative_to(folder.path))])
    if commit:
        state = RunState(stage, window=RewardWindow(8))
        folder.commit(state, {"x": np.zeros(1, np.float32)}, {})


def sent(log: MlflowLog) -> None:
    """Send, and wait for it."""
    log.send()
    log._thread.join(60)
    assert not log._thread.is_alive()


def store(folder: RunFolder) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{Path(folder.config.runs) / 'mlflow.db'}")


def runs(folder: RunFolder) -> list:
    client = store(folder)
    experiment = client.get_experiment_by_name("b2ray")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def history(folder: RunFolder) -> list[tuple[int, float]]:
    (run,) = runs(folder)
    found = store(folder).get_metric_history(run.info.run_id, "reward/mean")
    return sorted((m.step, m.value) for m in found)


def forget(folder: RunFolder, **notes: object) -> None:
    """As if the process had died before it wrote these notes down."""
    file = folder.path / "mlflow.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **notes}))


def test_a_line_that_is_sent_twice_is_one_entry(folder):
    log = MlflowLog(folder)
    stage_done(folder, 0)
    stage_done(folder, 1)
    sent(log)
    forget(folder, sent=-1)
    sent(MlflowLog(folder))
    assert history(folder) == [(0, 0.0), (1, 1 / 3)]
    (run,) = runs(folder)
    pictures = store(folder).list_artifacts(run.info.run_id, "images")
    # MLflow keeps a picture and its thumbnail for each step.
    assert len([p for p in pictures if p.path.endswith(".png")]) == 2
    assert "broken" not in run.data.metrics


def test_a_run_whose_id_was_lost_is_found_by_its_key(folder):
    stage_done(folder, 0)
    log = MlflowLog(folder)
    sent(log)
    first = log.run_id
    forget(folder, run_id=None, sent=-1)
    again = MlflowLog(folder)
    assert again.run_id is None
    stage_done(folder, 1)
    sent(again)
    assert again.run_id == first
    assert history(folder) == [(0, 0.0), (1, 1 / 3)]
    (run,) = runs(folder)
    assert run.info.run_name == "run"
    assert run.data.params["advantage.center"] == "group"


def test_a_run_that_is_found_again_may_have_another_fleet(folder):
    stage_done(folder, 0)
    sent(MlflowLog(folder))
    forget(folder, run_id=None, sent=-1)
    larger = Fleet(samplers=Samplers(max=7))
    stage_done(folder, 1)
    sent(MlflowLog(RunFolder(folder.path, folder.config.model_copy(update={"fleet": larger}))))
    assert history(folder) == [(0, 0.0), (1, 1 / 3)]


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_store_that_is_away_is_told_once_and_catches_up(folder, closed_port, monkeypatch, capfd):
    monkeypatch.setattr(mlflow_log, "RETRY_AFTER", 0.0)
    log = MlflowLog(folder)
    there, log.uri = log.uri, closed_port
    for stage in range(2):
        stage_done(folder, stage)
        sent(log)
    messages = [x for x in capfd.readouterr().err.splitlines() if "does not take figures" in x]
    assert len(messages) == 1
    assert closed_port in messages[0]
    assert "metrics.jsonl" in messages[0]
    assert log.run_id is None
    log.uri = there
    stage_done(folder, 2)
    sent(log)
    assert history(folder) == [(0, 0.0), (1, 1 / 3), (2, 2 / 3)]


def test_a_store_that_is_away_is_not_asked_at_every_stage(folder, closed_port):
    log = MlflowLog(folder)
    log.uri = closed_port
    stage_done(folder, 0)
    sent(log)
    asked = log._thread
    log.send()
    assert log._thread is asked


def test_the_end_sends_the_rest_and_closes_the_run(folder):
    stage_done(folder, 0)
    folder.summary_file.write_text("{}")
    log = MlflowLog(folder)
    log.finish("KILLED")
    assert not log.closed
    (run,) = runs(folder)
    assert run.info.status == "KILLED"
    assert history(folder) == [(0, 0.0)]
    files = {a.path for a in store(folder).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "summary.json"} <= files


def test_a_finished_run_is_closed_once_mlflow_has_everything(folder):
    stage_done(folder, 0)
    MlflowLog(folder).finish("FINISHED")  # there is no LoRA yet
    assert not MlflowLog(folder).closed
    lora = {"down.lora_A.weight": np.zeros((4, 2), np.float32)}
    lora_file.save(folder.lora, lora, folder.config.model.lora)
    MlflowLog(folder).finish("FINISHED", "The reward rose.")
    assert MlflowLog(folder).closed
    (run,) = runs(folder)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == "The reward rose."
    assert len(run.outputs.model_outputs) == 1


def machine_lines(folder: RunFolder, *hosts: str, at: float = 0.0) -> None:
    """A reading of each of these machines, ten seconds apart."""
    lines = [
        {"time": at + 10 * i, "host": host, "cpu_utilization_percentage": 10.0 + i}
        for i, host in enumerate(hosts)
    ]
    with folder.system_file.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def busy(folder: RunFolder, node: int) -> list[tuple[int, float]]:
    (run,) = runs(folder)
    name = f"system/node_{node}/cpu_utilization_percentage"
    found = store(folder).get_metric_history(run.info.run_id, name)
    return sorted((m.step, m.value) for m in found)


def test_machines_are_numbered_from_the_drivers_on_and_sent_once(folder):
    stage_done(folder, 0)
    here = socket.gethostname()
    machine_lines(folder, "far", here, "far")
    sent(MlflowLog(folder))
    assert busy(folder, 0) == [(10, 11.0)]
    assert busy(folder, 1) == [(0, 10.0), (20, 12.0)]
    machine_lines(folder, "third", "far", at=30.0)
    sent(MlflowLog(folder))
    forget(folder, system=0)  # as if the process had died before it noted what was sent
    sent(MlflowLog(folder))
    assert busy(folder, 1) == [(0, 10.0), (20, 12.0), (40, 11.0)]
    assert busy(folder, 2) == [(30, 10.0)]
    (run,) = runs(folder)
    assert [run.data.tags[f"b2ray.node_{i}"] for i in range(3)] == [here, "far", "third"]


def test_a_run_that_goes_on_has_the_tags_of_its_newest_process(folder, monkeypatch):
    stage_done(folder, 0)
    sent(MlflowLog(folder))
    monkeypatch.setattr("ray.__version__", "99.0")
    stage_done(folder, 1)
    sent(MlflowLog(folder))
    (run,) = runs(folder)
    assert run.data.tags["ray.version"] == "99.0"
    assert run.data.tags["b2ray.rewards"] == "clip"


def test_more_parameters_than_mlflow_takes_at_once_are_all_there(folder):
    rewards = tuple(Reward(name=f"r{i}", kind="clip") for i in range(30))
    many = RunFolder(folder.path, folder.config.model_copy(update={"rewards": rewards}))
    stage_done(folder, 0)
    sent(MlflowLog(many))
    (run,) = runs(folder)
    assert run.data.params == parameters(many.config)
    assert len(run.data.params) > 200


def test_an_unfinished_send_does_not_hold_up_the_stages(folder, monkeypatch):
    log = MlflowLog(folder)
    gate = threading.Event()
    monkeypatch.setattr(log, "_send_lines", lambda: gate.wait(30))
    log.send()
    running = log._thread
    log.send()
    assert log._thread is running
    assert running.is_alive()
    gate.set()
    running.join(30)


def test_what_did_not_commit_is_not_sent(folder):
    # The figures of a stage are written before its commit, which a full disk may refuse. Sent, they
    # would stay in MLflow, and those of the stage that is done again would not be.
    stage_done(folder, 0)
    stage_done(folder, 1, commit=False)
    MlflowLog(folder).finish("FAILED")
    assert history(folder) == [(0, 0.0)]
