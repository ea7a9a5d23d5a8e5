"""A finished run's LoRA as a model in MLflow, and in its registry if it is to be there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from b2ray.config import Config
from b2ray.options import find
from b2ray.tracking.folder import RunFolder

NAME = "lora"
PACKAGES = ("diffusers", "transformers", "peft", "torch", "accelerate", "safetensors")
PARAMETERS = ("seed", "preset", "model.path", "model.lora.rank", "model.lora.alpha")


def send(client: Any, run_id: str, folder: RunFolder, said: str = "") -> None:
    """Log the LoRA as a model of the run, and register it as `tracking.register_as` says.

    What an earlier try has done is found again and not done twice. A base model that is one file is
    nothing that MLflow's flavour can load: the LoRA is logged as files then.

    Args:
        said: what came of the run, as the registered version's description.
    """
    base = folder.config.model.path
    if _is_file(base):
        client.log_artifacts(run_id, str(folder.lora), NAME)
        return
    run = client.get_run(run_id)
    made = run.outputs.model_outputs if run.outputs else []
    model_id = made[0].model_id if made else _log(client, run, folder)
    if folder.config.tracking.register_as:
        _register(client, run_id, model_id, folder.config, said)


def problem(config: Config) -> str | None:
    """Why a run's LoRA cannot be registered, if so."""
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
    # One that is there already belongs to a process that died before it had told the run.
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    parameters = {k: v for k, v in run.data.params.items() if k in PARAMETERS}
    model = (
        found[0]
        if found
        else client.create_logged_model(experiment, NAME, run_id, params=parameters)
    )
    with tempfile.TemporaryDirectory() as beside:
        path = Path(beside) / NAME
        _save(path, folder, model)
        client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    output = LoggedModelOutput(model.model_id, step=config.curriculum.stages)
    client.log_outputs(run_id, [output])
    return str(model.model_id)


def _save(path: Path, folder: RunFolder, model: Any) -> None:
    """Write MLflow's form of the LoRA. `log_model` would load the whole pipeline here to try the
    example, and set MLflow's global store."""
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
        # Those that are installed, but for the build of torch: `+cu130` is on no public index.
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES],
    )
    if config.model.revision:  # the flavour asks the hub for the newest one
        described.flavors["diffusers"]["base_model_revision"] = config.model.revision
        described.save(str(path / "MLmodel"))


def _drawing(config: Config) -> dict[str, Any]:
    """How the run's pictures are drawn, by the names of a pipeline's arguments."""
    s = config.sampling
    return {"num_inference_steps": s.steps, "guidance_scale": s.guidance}


def _signature(config: Config) -> Any:
    """Prompts in, PNG files out; steps and guidance are the run's unless others are given."""
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
                # None is the model's own size.
                ParamSpec("height", "integer", config.sampling.height),
                ParamSpec("width", "integer", config.sampling.width),
                ParamSpec("negative_prompt", "string", ""),
            ]
        ),
    )


def _example(folder: RunFolder) -> Any:
    prompts = folder.prompts(0, "train")[:1] if folder.evaluated(0, "train") else ["a picture"]
    return {"prompt": prompts}, _drawing(folder.config)


def _register(client: Any, run_id: str, model_id: str, config: Config, said: str) -> None:
    """The next version under a name, unless this run has one."""
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
            description=said or None,
            tags={"b2ray.run": config.name, "b2ray.preset": config.preset},
        )


@contextmanager
def tracked_at(uri: str) -> Iterator[None]:
    """A registry in a file looks for models in MLflow's global store only. Left set, it (and the
    environment variable that goes with it) would be where the next run of this process is
    tracked."""
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
    """Absolute for a local folder: MLflow asks the hub about anything else."""
    local = find(base_model)
    return str(local.resolve()) if local else base_model
