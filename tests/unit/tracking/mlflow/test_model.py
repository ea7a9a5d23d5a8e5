"""The LoRA as a logged and registered model: once, whatever happens in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from b2ray.config import Config
from b2ray.diffusion import lora_file
from b2ray.errors import ConfigError
from b2ray.preflight import check_files
from b2ray.tracking.folder import RunFolder
from b2ray.tracking.mlflow import model as mlflow_model
from b2ray.tracking.mlflow.model import tracked_at
from tests.unit.report.runs import PROMPTS, settings, write_run


def finished(runs: Path, base: Path, **over: Any) -> RunFolder:
    """A run's folder with a LoRA."""
    values = {"model": {"path": str(base)}, "tracking": {"register_as": "mine"}, **over}
    folder = write_run(settings(runs, **values))
    lora = {"down.lora_A.weight": np.zeros((4, 2), np.float32)}
    lora_file.save(folder.lora, lora, folder.config.model.lora)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where the base model is; MLflow keeps only the path."""
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


def new_run(client: mlflow.MlflowClient) -> str:
    return client.create_run("0").info.run_id


def models(client: mlflow.MlflowClient, run_id: str) -> list[str]:
    return [m.model_id for m in client.get_run(run_id).outputs.model_outputs]


def versions(client: mlflow.MlflowClient) -> list[tuple[str, str]]:
    found = client.search_model_versions("name = 'mine'")
    return sorted((v.version, v.run_id) for v in found)


def test_it_is_one_model_and_one_version_however_often_it_is_sent(client, runs_with_store, base):
    folder, run_id = finished(runs_with_store, base), new_run(client)
    for _ in range(2):
        mlflow_model.send(client, run_id, folder, "The reward rose.")
    (model_id,) = models(client, run_id)
    assert not mlflow.is_tracking_uri_set()  # the next run of this process has its own
    assert [str(v) for v, _ in versions(client)] == ["1"]
    version = client.get_model_version("mine", "1")
    assert version.source == f"models:/{model_id}" and version.description == "The reward rose."
    other = new_run(client)
    mlflow_model.send(client, other, folder)
    assert [(str(v), r) for v, r in versions(client)] == [("1", run_id), ("2", other)]


def test_a_model_whose_process_died_before_it_told_the_run_is_gone_on_with(
    client, runs_with_store, base, monkeypatch
):
    folder, run_id = finished(runs_with_store, base), new_run(client)

    def dies(*_: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(client, "log_model_artifacts", dies)
        with pytest.raises(ConnectionError):
            mlflow_model.send(client, run_id, folder)
    (pending,) = client.search_logged_models(["0"])
    mlflow_model.send(client, run_id, folder)
    (model,) = client.search_logged_models(["0"])
    assert model.model_id == pending.model_id == models(client, run_id)[0]
    assert model.status == "READY"


def test_its_signature_and_example_are_the_runs_own(client, runs_with_store, base):
    sampling = {"steps": 10, "guidance": 3.5, "height": 64, "width": 48}
    folder = finished(runs_with_store, base, sampling=sampling)
    run_id = new_run(client)
    mlflow_model.send(client, run_id, folder)
    (model_id,) = models(client, run_id)
    with tracked_at(client.tracking_uri):
        local = mlflow.artifacts.download_artifacts(f"models:/{model_id}")
    model = mlflow.models.Model.load(local)
    assert model.signature.inputs.input_names() == ["prompt"]
    defaults = {p.name: p.default for p in model.signature.params}
    assert defaults["num_inference_steps"] == 10 and defaults["guidance_scale"] == 3.5
    assert (defaults["height"], defaults["width"]) == (64, 48)
    assert model.load_input_example(local)["prompt"] == [PROMPTS[0]]
    assert model.flavors["diffusers"]["base_model"] == str(base)


def test_a_revision_of_the_base_model_is_kept(client, runs_with_store, base):
    folder = finished(runs_with_store, base, model={"path": str(base), "revision": "abc123"})
    run_id = new_run(client)
    mlflow_model.send(client, run_id, folder)
    (model_id,) = models(client, run_id)
    with tracked_at(client.tracking_uri):
        local = mlflow.artifacts.download_artifacts(f"models:/{model_id}")
    flavour = mlflow.models.Model.load(local).flavors["diffusers"]
    assert flavour["base_model_revision"] == "abc123"


def test_it_is_not_registered_unless_a_name_is_given(client, runs_with_store, base):
    folder, run_id = finished(runs_with_store, base, tracking={}), new_run(client)
    mlflow_model.send(client, run_id, folder)
    assert len(models(client, run_id)) == 1
    assert not client.search_registered_models()


def test_the_lora_of_a_single_file_model_is_logged_as_files(client, runs_with_store, tmp_path):
    """The diffusers flavour takes a pipeline's folder or hub id, and no checkpoint file."""
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"")
    folder, run_id = finished(runs_with_store, file, tracking={}), new_run(client)
    mlflow_model.send(client, run_id, folder)
    found = [a.path for a in client.list_artifacts(run_id, "lora")]
    assert found == ["lora/pytorch_lora_weights.safetensors"]


def test_it_cannot_be_registered_then(tmp_path):
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"")
    config: Config = settings(tmp_path, model={"path": str(file)}, tracking={"register_as": "x"})
    with pytest.raises(ConfigError, match=r"tracking.register_as is 'x' but model.path is one"):
        check_files(config)
