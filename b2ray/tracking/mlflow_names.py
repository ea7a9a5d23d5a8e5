"""What a run is called in MLflow: where it is kept, its tags and its parameters."""

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

PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its page shows a run beneath this one


def tracking_uri(config: Config) -> str:
    """The configured store, else MLFLOW_TRACKING_URI, else SQLite beside the runs."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(config)


def artifacts(config: Config, uri: str) -> str | None:
    """Beside the runs for our own SQLite file; a server knows where it keeps artifacts."""
    if uri != _local_uri(config):
        return None
    return (Path(config.runs).resolve() / "mlartifacts").as_uri()


def tags(config: Config) -> dict[str, str]:
    """What runs are told apart and searched by."""
    source = "demonstrations" if config.demonstrations.path else ""
    found = {
        "b2ray.preset": config.preset,
        "b2ray.model": config.model.path,
        "b2ray.rewards": ", ".join(r.name for r in config.rewards) or source,
        "b2ray.heldout_rewards": ", ".join(r.name for r in config.evaluation.heldout_rewards),
        PARENT_TAG: config.tracking.parent or "",
    }
    return {name: value for name, value in found.items() if value} | origin()


def origin() -> dict[str, str]:
    """Which versions a run is of, and MLflow's own tags for who ran what."""
    import ray

    found = {
        "b2ray.version": b2ray.__version__,
        "ray.version": ray.__version__,
        "mlflow.source.name": "b2ray",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": _commit(),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        found["mlflow.user"] = getpass.getuser()
    return {name: value for name, value in found.items() if value}


def parameters(config: Config) -> dict[str, str]:
    """What decides the result, as section.field. MLflow refuses a parameter that changes, so that
    what a run may change when it is resumed is not among them."""
    return flat(config.identity())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as section.field: text, MLflow's form of parameters.

    Of a list of things with names each has fields of its own: rewards.NAME.weight.
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
    """The git commit of the working directory, which has the user's prompts and rewards."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return done.stdout.strip()
    return ""


def _local_uri(config: Config) -> str:
    return f"sqlite:///{Path(config.runs).resolve() / 'mlflow.db'}"
