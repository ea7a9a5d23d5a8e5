"""Logs the LoRA of a finished run as a model in MLflow, and registers it if that is wanted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from b2ray.config import Config
from b2ray.config.paths import find
from b2ray.tracking.folder import RunFolder

NAME = "lora"
PACKAGES = ("diffusers", "transformers", "peft", "torch", "accelerate", "safetensors")
PARAMETERS = ("seed", "preset", "model.path", "model.lora.rank", "model.lora.alpha")


def send(client: Any, run_id: str, folder: RunFolder, outcome: str = "") -> None:
    """Log the LoRA as a model of the MLflow run, and register it as `tracking.register_as` says.

    What an earlier try has logged or registered is not repeated. MLflow's diffusers flavour cannot
    load a base model that is a single file; then the LoRA is logged as plain files.

    Args:
        client: an `MlflowClient`.
        run_id: the MLflow run.
        folder: the folder of the finished run.
        outcome: how the run has ended, in a sentence that describes the registered version.
    """
    base = folder.config.model.path
    if _is_file(base):
        client.log_artifacts(run_id, str(folder.lora), NAME)
        return
    run = client.get_run(run_id)
    logged = run.outputs.model_outputs if run.outputs else []
    model_id = logged[0].model_id if logged else _log(client, run, folder)
    if folder.config.tracking.register_as:
        _register(client, run_id, model_id, folder.config, outcome)


def problem(config: Config) -> str | None:
    """Return why the LoRA of such a run cannot be registered; None if it can, or is not to be."""
    name = config.tracking.register_as
    if name is None or not _is_file(config.model.path):
        return None
    return (
        f"tracking.register_as is {name!r} but model.path is one file, which MLflow's diffusers "
        "flavour cannot load a LoRA into: give a pipeline's folder or hub id, or leave it out"
    )


def _log(client: Any, run: Any, folder: RunFolder) -> str:
    from mlflow.entities import LoggedModelOutput

    run_id, experiment, config = run.info.run_id, run.info.experiment_id, folder.config
    # A process may have died after it created the model and before it linked the run to it.
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    parameters = {k: v for k, v in run.data.params.items() if k in PARAMETERS}
    model = (
        models[0]
        if models
        else client.create_logged_model(experiment, NAME, run_id, params=parameters)
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / NAME
        _save(path, folder, model)
        client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    output = LoggedModelOutput(model.model_id, step=config.curriculum.stages)
    client.log_outputs(run_id, [output])
    return str(model.model_id)


def _save(path: Path, folder: RunFolder, model: Any) -> None:
    """Write the LoRA as a folder in MLflow's model format.

    `mlflow.diffusers.log_model` would load the whole pipeline to try the example, and change the
    tracking store of the whole process.
    """
    import mlflow
    from mlflow.models import Model

    config = folder.config
    described = Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
    )
    mlflow.diffusers.save_model(
        adapter_path=str(folder.lora),
        path=str(path),
        base_model=_flavour_path(config.model.path),
        mlflow_model=described,
        signature=_signature(config),
        input_example=_example(folder),
        # The installed versions without local labels: torch's `+cu130` is on no public index.
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES],
    )
    if config.model.revision:  # without it the flavour would load the newest revision
        described.flavors["diffusers"]["base_model_revision"] = config.model.revision
        described.save(str(path / "MLmodel"))


def _drawing(config: Config) -> dict[str, Any]:
    """Return the run's sampling settings under the names of a pipeline's arguments."""
    s = config.sampling
    return {"num_inference_steps": s.steps, "guidance_scale": s.guidance}


def _signature(config: Config) -> Any:
    """Describe the model to MLflow: prompts in, PNG files out, the run's settings by default."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    steps, guidance = _drawing(config).values()
    return ModelSignature(
        Schema([ColSpec("string", "prompt")]),
        Schema([ColSpec("binary", "image")]),
        ParamSchema(
            [
                ParamSpec("num_inference_steps", "integer", steps),
                ParamSpec("guidance_scale", "double", guidance),
                # None stands for the native size of the model.
                ParamSpec("height", "integer", config.sampling.height),
                ParamSpec("width", "integer", config.sampling.width),
                ParamSpec("negative_prompt", "string", ""),
            ]
        ),
    )


def _example(folder: RunFolder) -> Any:
    prompts = folder.prompts(0, "train")[:1] if folder.evaluated(0, "train") else ["a picture"]
    return {"prompt": prompts}, _drawing(folder.config)


def _register(client: Any, run_id: str, model_id: str, config: Config, outcome: str) -> None:
    """Register the model as the next version of a name, unless this run has a version already."""
    from mlflow.exceptions import MlflowException

    name = config.tracking.register_as
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return
    with tracked_at(client.tracking_uri):
        client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            description=outcome or None,
            tags={"b2ray.run": config.name, "b2ray.preset": config.preset},
        )


@contextmanager
def tracked_at(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking store inside a `with` block, and restore it afterwards.

    A registry in a file looks for models in the global store only. If the setting stayed, the next
    run of this process would be tracked there, because it also sets an environment variable.

    Args:
        uri: the tracking store.
    """
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _is_file(base_model: str) -> bool:
    local = find(base_model)
    return local is not None and local.is_file()


def _flavour_path(base_model: str) -> str:
    """Make the path of a local folder absolute, because MLflow takes anything else for a hub id."""
    local = find(base_model)
    return str(local.resolve()) if local else base_model
