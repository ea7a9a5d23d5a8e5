"""MLflow: a copy of the run's folder that is allowed to be late.

metrics.jsonl is the record. Lines are sent with the time they were written, so that sending one
twice changes nothing, and what a store that was away has missed is sent when it is back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from b2ray.config import Config
from b2ray.discretion import masked
from b2ray.options import find
from b2ray.tracking.folder import RunFolder, write_atomically

RETRY_AFTER = 60.0  # seconds before a store that did not answer is asked again
FINISH_WITHIN = 120.0  # seconds for the last figures and the LoRA to be sent
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its page shows a run beneath this one


class MlflowLog:
    """One MLflow run, kept in step with the run's folder.

    Which run it is stands in mlflow.json from before the run is created: `key` is a tag by which a
    run is found again whose id was not written down in time.
    """

    def __init__(self, folder: RunFolder) -> None:
        # Without these a server that is away holds a stage up for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
        self.folder, self.config = folder, folder.config
        self.uri = tracking_uri(self.config)
        self._file = folder.path / "mlflow.json"
        self._away_since: float | None = None
        # Beside the training: the store is slow against a small model's stages. One at a time, and
        # never waited for at the end of the process.
        self._thread: threading.Thread | None = None
        self._running = False
        if not self._file.exists():
            self._note(key=uuid.uuid4().hex, run_id=None, sent=-1)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, None until the store has answered once."""
        return self._notes()["run_id"]

    @property
    def closed(self) -> bool:
        """Whether MLflow has everything of a finished run."""
        return bool(self._notes().get("closed"))

    def send(self) -> None:
        """Send what the store has not seen, beside the training. Never fails, never waits."""
        recent = self._away_since is not None and time.monotonic() - self._away_since < RETRY_AFTER
        if not recent and (self._thread is None or not self._thread.is_alive()):
            self._start(self._send_lines)

    def finish(self, status: str, base_model: str | None = None) -> None:
        """Send the rest and close the run as FINISHED, KILLED or FAILED; with the LoRA as a
        model if `base_model` says what it is for. Waits a bounded time."""
        if self.run_id is None and not self.folder.metrics():
            return  # ended before there was anything to tell

        def close() -> None:
            self._send_lines()
            self._finish(status, base_model)

        until = time.monotonic() + FINISH_WITHIN
        if self._thread is not None:
            self._thread.join(FINISH_WITHIN)
        if self._thread is None or not self._thread.is_alive():
            self._start(close).join(max(0.0, until - time.monotonic()))
        if self._thread is not None and self._thread.is_alive():
            print(
                f"MLflow at {masked(self.uri)} did not answer in {FINISH_WITHIN:.0f} s",
                file=sys.stderr,
            )

    def _start(self, action: Callable[[], object]) -> threading.Thread:
        self._thread = threading.Thread(target=self._safely, args=(action,), daemon=True)
        self._thread.start()
        return self._thread

    def _send_lines(self) -> None:
        from mlflow.entities import Metric

        client, run_id = self._client(), self._run()
        sent, committed = self._notes()["sent"], self.folder.committed
        for line in self.folder.metrics():
            if not sent < line["step"] <= committed:
                continue
            stamp, step = int(line["time"] * 1000), line["step"]
            figures = {k: v for k, v in line.items() if k not in ("step", "time", "images")}
            client.log_batch(
                run_id,
                metrics=[
                    Metric(name, value, stamp, step)
                    for name, value in figures.items()
                    if math.isfinite(value)
                ],
            )
            self._send_images(client, run_id, line, stamp)
            self._note(sent=step)

    def _send_images(self, client: Any, run_id: str, line: Mapping[str, Any], stamp: int) -> None:
        there = [a.path for a in client.list_artifacts(run_id, "images")] if line["images"] else []
        for name in line["images"]:
            key, step = Path(name).stem, line["step"]
            # MLflow names the file key+step+N+timestamp+…: the end is random, the rest is ours.
            if any(re.search(rf"/{re.escape(key)}[%+]step[%+]{step}[%+]", p) for p in there):
                continue
            with Image.open(self.folder.path / name) as picture:
                client.log_image(
                    run_id, picture.convert("RGB"), key=key, step=step, timestamp=stamp
                )

    def _finish(self, status: str, base_model: str | None) -> None:
        client, run_id = self._client(), self._run()
        path = self.folder.path
        for file in (path / "config.yaml", self.folder.summary_file, path / "report.html"):
            if file.exists():
                client.log_artifact(run_id, str(file))
        if base_model is not None and _is_file(base_model):
            # The flavour wants a pipeline's folder or hub id to load the LoRA into.
            client.log_artifacts(run_id, str(self.folder.lora), "lora")
        elif base_model is not None:
            self._log_model(run_id, base_model)
        client.set_terminated(run_id, status)
        self._note(closed=status == "FINISHED")

    def _log_model(self, run_id: str, base_model: str) -> None:
        import mlflow

        if self._client().get_run(run_id).outputs.model_outputs:
            return  # logged by a process that died after it
        with tracked_at(self.uri), mlflow.start_run(run_id=run_id):
            mlflow.diffusers.log_model(
                adapter_path=str(self.folder.lora),
                base_model=_flavour_path(base_model),
                name="lora",
                # Given, so that MLflow does not load the model in a subprocess to find out.
                pip_requirements=["diffusers", "transformers", "peft", "torch"],
            )

    def _client(self) -> Any:
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # migrations are no news
        return mlflow.MlflowClient(self.uri)

    def _run(self) -> str:
        """The run's id; creates the run, or finds the one whose id was lost."""
        notes = self._notes()
        if notes["run_id"]:
            if not self._running:  # it was closed when the process before this one stopped
                self._client().update_run(notes["run_id"], status="RUNNING")
                self._running = True
            return str(notes["run_id"])
        from mlflow.entities import Param

        client = self._client()
        name = self.config.tracking.experiment
        found = client.get_experiment_by_name(name)
        experiment = (
            found.experiment_id
            if found
            else client.create_experiment(name, artifact_location=self._artifacts())
        )
        tag = f"tags.`b2ray.key` = '{notes['key']}'"
        runs = client.search_runs([experiment], filter_string=tag)
        run = (
            runs[0]
            if runs
            else client.create_run(
                experiment,
                run_name=self.config.name,
                tags={
                    "b2ray.key": notes["key"],
                    "b2ray.preset": self.config.preset,
                    **(
                        {PARENT_TAG: self.config.tracking.parent}
                        if self.config.tracking.parent
                        else {}
                    ),
                },
            )
        )
        # MLflow refuses a parameter that changes: only what a run may not change.
        params = [Param(key, value) for key, value in flat(self.config.identity()).items()]
        client.log_batch(run.info.run_id, params=params)
        self._note(run_id=run.info.run_id)
        return str(run.info.run_id)

    def _artifacts(self) -> str | None:
        """Beside the runs for our own SQLite file; a server knows where it keeps artifacts."""
        if self.uri != _local_uri(self.config):
            return None
        return (Path(self.config.runs).resolve() / "mlartifacts").as_uri()

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
            self._away_since = None
        except Exception as error:  # any store, any fault: metrics.jsonl has everything
            if self._away_since is None:
                reason = masked(" ".join(str(error).split()))[:200]
                print(
                    f"MLflow at {masked(self.uri)} does not take figures ({reason}); "
                    f"{self.folder.metrics_file} has them, they are sent later",
                    file=sys.stderr,
                )
            self._away_since = time.monotonic()

    def _notes(self) -> dict[str, Any]:
        return dict(json.loads(self._file.read_text()))

    def _note(self, **values: Any) -> None:
        old = self._notes() if self._file.exists() else {}
        write_atomically(self._file, json.dumps({**old, **values}))


def tracking_uri(config: Config) -> str:
    """The configured store, else MLFLOW_TRACKING_URI, else SQLite beside the runs."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(config)


@contextmanager
def tracked_at(uri: str) -> Iterator[None]:
    """Models are logged to MLflow's global store only. Left set, it (and the environment variable
    that goes with it) would be where the next run of this process is tracked."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _local_uri(config: Config) -> str:
    return f"sqlite:///{Path(config.runs).resolve() / 'mlflow.db'}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as section.field: text, MLflow's form of parameters."""
    pairs: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = str(value)[:6000]
    return pairs


def _is_file(base_model: str) -> bool:
    local = find(base_model)
    return local is not None and local.is_file()


def _flavour_path(base_model: str) -> str:
    """Absolute for a local folder: MLflow asks the hub about anything else."""
    local = find(base_model)
    return str(local.resolve()) if local else base_model
