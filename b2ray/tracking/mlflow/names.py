"""How a run appears in MLflow: its store, its tags and its parameters."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import b2ray
from b2ray.config import Config

PARENT_TAG = "mlflow.parentRunId"  # MLflow's page shows a run with this tag beneath its parent


def tracking_uri(config: Config) -> str:
    """Return the configured store, else MLFLOW_TRACKING_URI, else a SQLite file beside the runs."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(config)


def artifacts(config: Config, uri: str) -> str | None:
    """Return where a new experiment keeps its artifacts; None leaves it to the server.

    Args:
        config: the run's configuration.
        uri: the store; only that of the SQLite file beside the runs has its artifacts there, too.
    """
    if uri != _local_uri(config):
        return None
    return (Path(config.runs).resolve() / "mlartifacts").as_uri()


def tags(config: Config) -> dict[str, str]:
    """Return the tags by which runs are searched and compared; empty ones are left out."""
    source = "demonstrations" if config.demonstrations.path else ""
    values = {
        "b2ray.preset": config.preset,
        "b2ray.model": config.model.path,
        "b2ray.rewards": ", ".join(r.name for r in config.rewards) or source,
        "b2ray.heldout_rewards": ", ".join(r.name for r in config.evaluation.heldout_rewards),
        PARENT_TAG: config.tracking.parent or "",
    }
    return {name: value for name, value in values.items() if value} | origin()


def origin() -> dict[str, str]:
    """Return tags with the versions of the software, and MLflow's own tags for user and source."""
    import ray

    values = {
        "b2ray.version": b2ray.__version__,
        "ray.version": ray.__version__,
        "mlflow.source.name": "b2ray",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": _commit(),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        values["mlflow.user"] = getpass.getuser()
    return {name: value for name, value in values.items() if value}


def parameters(config: Config) -> dict[str, str]:
    """Return the fields that decide the result, as section.field.

    MLflow refuses to change a parameter, so the fields that may change when a run is resumed are
    left out.
    """
    return flat(config.identity())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings into texts by section.field, as MLflow wants its parameters.

    The entries of a list of named things are flattened by their names, as rewards.NAME.weight.

    Args:
        values: the settings.
        prefix: what the names begin with.
    """
    pairs: dict[str, str] = {}
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w.\- /]", "_", str(key))
        if isinstance(value, Mapping):
            pairs |= flat(value, f"{name}.")
        elif value and isinstance(value, list) and all(_is_named(v) for v in value):
            pairs[name] = ", ".join(v["name"] for v in value)
            for named in value:
                fields = {k: v for k, v in named.items() if k != "name"}
                pairs |= flat(fields, f"{name}.{named['name']}.")
        else:
            pairs[name] = str(value)[:6000]
    return pairs


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and "name" in value


def _commit() -> str:
    """Return the git commit of the working directory, where the user's prompts and rewards are."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return process.stdout.strip()
    return ""


def _local_uri(config: Config) -> str:
    return f"sqlite:///{Path(config.runs).resolve() / 'mlflow.db'}"
