"""MLflow: a copy of the run's folder that is allowed to be late.

metrics.jsonl and system.jsonl are the record. Lines are sent with the time they were written, so
that sending one twice changes nothing, and what a store that was away has missed is sent when it is
back. Everything else is sent under names that do not change, over what is there.
"""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from b2ray.discretion import masked
from b2ray.tracking import machines, mlflow_model, mlflow_table
from b2ray.tracking.folder import RunFolder, write_atomically
from b2ray.tracking.mlflow_names import artifacts, parameters, tags, tracking_uri
from b2ray.tracking.mlflow_store import client_of, prepare, reason, run_of

RETRY_AFTER = 60.0  # seconds before a store that did not answer is asked again
FINISH_WITHIN = 120.0  # seconds for the last figures and the LoRA to be sent
METRICS, PARAMS = 1000, 100  # that MLflow takes at once


class MlflowLog:
    """One MLflow run, kept in step with the run's folder.

    Which run it is stands in mlflow.json from before the run is created: `key` is a tag by which a
    run is found again whose id was not written down in time.
    """

    def __init__(self, folder: RunFolder) -> None:
        prepare()
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

    def finish(self, status: str, said: str = "") -> None:
        """Send the rest and close the run as FINISHED, with the LoRA as a model, or as KILLED or
        FAILED. Waits a bounded time.

        Args:
            said: what came of the run, for people.
        """
        if self.run_id is None and not self.folder.metrics():
            return  # ended before there was anything to tell

        def close() -> None:
            self._send_lines()
            self._finish(status, said)

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
            if mlflow_table.is_due(self.folder, step):
                mlflow_table.send(client, run_id, self.folder, step)
            self._note(sent=step)
        self._send_machines(client, run_id)

    def _send_machines(self, client: Any, run_id: str) -> None:
        """How busy machines were, each under a number of its own: node_0 is the driver's."""
        from mlflow.entities import Metric

        notes = self._notes()
        lines, end = machines.read(self.folder.system_file, notes.get("system", 0))
        if not lines:
            return
        known, began = notes.get("hosts", []), notes.get("began", lines[0]["time"])
        hosts = known or [socket.gethostname()]
        hosts = list(dict.fromkeys([*hosts, *(line["host"] for line in lines)]))
        for number, host in list(enumerate(hosts))[len(known) :]:
            client.set_tag(run_id, f"b2ray.node_{number}", host)
        found = []
        for line in lines:
            stamp, step = int(line["time"] * 1000), round(line["time"] - began)
            place = f"system/node_{hosts.index(line['host'])}"
            figures = {k: v for k, v in line.items() if k not in ("time", "host")}
            found += [Metric(f"{place}/{k}", v, stamp, step) for k, v in figures.items()]
        for batch in _batches(found, METRICS):
            client.log_batch(run_id, metrics=batch)
        self._note(system=end, hosts=hosts, began=began)

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

    def _finish(self, status: str, said: str) -> None:
        client, run_id = self._client(), self._run()
        path = self.folder.path
        for file in (path / "config.yaml", self.folder.summary_file, path / "report.html"):
            if file.exists():
                client.log_artifact(run_id, str(file))
        if said:
            client.set_tag(run_id, "mlflow.note.content", said)
        if status == "FINISHED":
            mlflow_model.send(client, run_id, self.folder, said)
        client.set_terminated(run_id, status)
        self._note(closed=status == "FINISHED")

    def _client(self) -> Any:
        return client_of(self.uri)

    def _run(self) -> str:
        """The run's id; creates the run, or finds the one whose id was lost."""
        notes = self._notes()
        if notes["run_id"]:
            if not self._running:  # it was closed when the process before this one stopped
                self._client().update_run(notes["run_id"], status="RUNNING")
                self._tag(notes["run_id"])
                self._running = True
            return str(notes["run_id"])
        from mlflow.entities import Param

        client = self._client()
        config = self.config
        place = artifacts(config, self.uri)
        run = run_of(client, config.tracking.experiment, place, notes["key"], config.name)
        self._tag(run.info.run_id)
        # MLflow refuses a parameter that changes; those of a run that was found stay.
        new = {k: v for k, v in parameters(self.config).items() if k not in run.data.params}
        for batch in _batches([Param(k, v) for k, v in new.items()], PARAMS):
            client.log_batch(run.info.run_id, params=batch)
        self._note(run_id=run.info.run_id)
        self._running = True
        return str(run.info.run_id)

    def _tag(self, run_id: str) -> None:
        """The tags of this process, which may have other versions than the one before."""
        from mlflow.entities import RunTag

        found = [RunTag(k, v) for k, v in tags(self.config).items()]
        self._client().log_batch(run_id, tags=found)

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
            self._away_since = None
        except Exception as error:  # any store, any fault: metrics.jsonl has everything
            if self._away_since is None:
                print(
                    f"MLflow at {masked(self.uri)} does not take figures ({reason(error)}); "
                    f"{self.folder.metrics_file} has them, they are sent later",
                    file=sys.stderr,
                )
            self._away_since = time.monotonic()

    def _notes(self) -> dict[str, Any]:
        return dict(json.loads(self._file.read_text()))

    def _note(self, **values: Any) -> None:
        old = self._notes() if self._file.exists() else {}
        write_atomically(self._file, json.dumps({**old, **values}))


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """At most so many at a time."""
    for i in range(0, len(values), size):
        yield values[i : i + size]
