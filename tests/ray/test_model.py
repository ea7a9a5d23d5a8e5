"""The model that a finished run logs to MLflow: it loads there and draws with the LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from b2ray.diffusion.lora_file import FILE, load
from b2ray.tracking.mlflow.model import tracked_at
from tests.models import PROMPTS, pipeline
from tests.runner import Runner


@pytest.fixture
def uri(runner: Runner, undisturbed: str) -> Iterator[str]:
    """Where MLflow has the model of the undisturbed run."""
    store = f"sqlite:///{runner.runs / 'mlflow.db'}"
    notes = json.loads((runner.runs / undisturbed / "mlflow.json").read_text())
    (model,) = mlflow.MlflowClient(store).get_run(notes["run_id"]).outputs.model_outputs
    with tracked_at(store):
        yield f"models:/{model.model_id}"


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(0)
    return pipe(PROMPTS[0], num_inference_steps=4, generator=source, output_type="np").images


def test_it_loads_as_a_pipeline_that_draws_as_the_runs_lora_does(
    runner: Runner, undisturbed: str, uri: str
) -> None:
    model = mlflow.diffusers.load_model(uri)
    assert model.base_model == str((runner.models / "base").resolve())
    pipe = model.load_pipeline(device="cpu")
    own = runner.runs / undisturbed / "lora"
    found = {n: v for n, v in pipe.unet.state_dict().items() if ".lora_" in n}
    expected = {n.replace(".weight", ".default_0.weight"): v for n, v in load(own / FILE).items()}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n].numpy(), expected[n]) for n in found)

    plain = pipeline()
    before = draw(plain)
    plain.load_lora_weights(own)
    assert np.abs(draw(pipe) - draw(plain)).max() < 1e-5
    assert np.abs(draw(pipe) - before).max() > 1e-3


def test_it_serves_pictures_as_a_python_function(uri: str, tmp_path) -> None:
    model = mlflow.pyfunc.load_model(uri)
    size = {"num_inference_steps": 2, "height": 16, "width": 16}
    (png,) = model.predict({"prompt": [PROMPTS[0]]}, params=size)
    (tmp_path / "x.png").write_bytes(png)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (16, 16)
