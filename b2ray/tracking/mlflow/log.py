"""MLflow gets a copy of the run's folder, which may lag behind.

metrics.jsonl and system.jsonl are the original. Their lines are sent with the time at which they
were written, so that sending a line twice changes nothing, and what the store missed while it did
not answer is sent later. Everything else is sent under fixed names and replaces what the store has.
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

from b2ray.config.secrets import masked
from b2ray.tracking import system_metrics
from b2ray.tracking.folder import RunFolder, write_atomically
from b2ray.tracking.mlflow import model, table
from b2ray.tracking.mlflow.names import artifacts, parameters, tags, tracking_uri
from b2ray.tracking.mlflow.store import client_of, prepare, reason, run_of

RETRY_AFTER = 60.0  # seconds before a store that did not answer is asked again
FINISH_WITHIN = 120.0  # seconds for the last figures and the LoRA to be sent
METRICS, PARAMS = 1000, 100  # how many MLflow takes in one request


class MlflowLog:
    """The MLflow run of one run folder.

    mlflow.json identifies it, and is written before the MLflow run is created: its `key` becomes a
    tag of the MLflow run, by which that is found again if the process dies before it has written
    down the id.

    Args:
        folder: the run's folder, opened for writing.
    """

    def __init__(self, folder: RunFolder) -> None:
        prepare()
        self.folder, self.config = folder, folder.config
        self.uri = tracking_uri(self.config)
        self._file = folder.path / "mlflow.json"
        self._away_since: float | None = None
        # A store can be slower than the stages of a small model, so it is written to from a thread.
        # There is one thread at a time; as a daemon it does not keep the process alive.
        self._thread: threading.Thread | None = None
        self._running = False
        if not self._file.exists():
            self._note(key=uuid.uuid4().hex, run_id=None, sent=-1)

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None until the store has answered once."""
        return self._notes()["run_id"]

    @property
    def closed(self) -> bool:
        """Whether the run has finished and MLflow has everything of it."""
        return bool(self._notes().get("closed"))

    def send(self) -> None:
        """Send what the store does not have yet, from a thread.

        It returns at once and never fails. Nothing is sent while the last thread is at work, nor
        for a while after the store did not answer.
        """
        recent = self._away_since is not None and time.monotonic() - self._away_since < RETRY_AFTER
        if not recent and (self._thread is None or not self._thread.is_alive()):
            self._start(self._send_lines)

    def finish(self, status: str, outcome: str = "") -> None:
        """Send the rest and close the MLflow run; wait at most `FINISH_WITHIN` seconds.

        Args:
            status: FINISHED, which also logs the LoRA as a model, KILLED or FAILED.
            outcome: how the run has ended, in a sentence that describes the MLflow run.
        """
        if self.run_id is None and not self.folder.metrics():
            return  # the run ended before there was anything to send

        def close() -> None:
            self._send_lines()
            self._finish(status, outcome)

        deadline = time.monotonic() + FINISH_WITHIN
        # Let the thread that is sending come to its end, then send the rest.
        if self._thread is not None:
            self._thread.join(FINISH_WITHIN)
        if self._thread is None or not self._thread.is_alive():
            self._start(close).join(max(0.0, deadline - time.monotonic()))
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
        """Send the new committed lines of metrics.jsonl, their pictures, and the system metrics."""
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
            if table.is_due(self.folder, step):
                table.send(client, run_id, self.folder, step)
            self._note(sent=step)
        self._send_machines(client, run_id)

    def _send_machines(self, client: Any, run_id: str) -> None:
        """Send the system metrics; every machine has a number, and node_0 is the driver's."""
        from mlflow.entities import Metric

        notes = self._notes()
        lines, end = system_metrics.read(self.folder.system_file, notes.get("system", 0))
        if not lines:
            return
        # Number the machines that are new, and keep the numbers of the others.
        known, began = notes.get("hosts", []), notes.get("began", lines[0]["time"])
        hosts = known or [socket.gethostname()]
        hosts = list(dict.fromkeys([*hosts, *(line["host"] for line in lines)]))
        for number, host in list(enumerate(hosts))[len(known) :]:
            client.set_tag(run_id, f"b2ray.node_{number}", host)
        # The step of a system metric is the number of seconds since the first reading.
        metrics = []
        for line in lines:
            stamp, step = int(line["time"] * 1000), round(line["time"] - began)
            prefix = f"system/node_{hosts.index(line['host'])}"
            figures = {k: v for k, v in line.items() if k not in ("time", "host")}
            metrics += [Metric(f"{prefix}/{k}", v, stamp, step) for k, v in figures.items()]
        for batch in _batches(metrics, METRICS):
            client.log_batch(run_id, metrics=batch)
        self._note(system=end, hosts=hosts, began=began)

    def _send_images(self, client: Any, run_id: str, line: Mapping[str, Any], stamp: int) -> None:
        if not line["images"]:
            return
        sent = [a.path for a in client.list_artifacts(run_id, "images")]
        for name in line["images"]:
            key, step = Path(name).stem, line["step"]
            # MLflow names the file key+step+N+timestamp+…, with random characters at the end.
            if any(re.search(rf"/{re.escape(key)}[%+]step[%+]{step}[%+]", p) for p in sent):
                continue
            with Image.open(self.folder.path / name) as picture:
                client.log_image(
                    run_id, picture.convert("RGB"), key=key, step=step, timestamp=stamp
                )

    def _finish(self, status: str, outcome: str) -> None:
        client, run_id = self._client(), self._run()
        path = self.folder.path
        for file in (path / "config.yaml", self.folder.summary_file, path / "report.html"):
            if file.exists():
                client.log_artifact(run_id, str(file))
        if outcome:
            client.set_tag(run_id, "mlflow.note.content", outcome)
        if status == "FINISHED":
            model.send(client, run_id, self.folder, outcome)
        client.set_terminated(run_id, status)
        self._note(closed=status == "FINISHED")

    def _client(self) -> Any:
        return client_of(self.uri)

    def _run(self) -> str:
        """Return the id of the MLflow run, which is created or found by its key if need be."""
        notes = self._notes()
        if notes["run_id"]:
            if not self._running:  # an earlier process may have closed it when it stopped
                self._client().update_run(notes["run_id"], status="RUNNING")
                self._tag(notes["run_id"])
                self._running = True
            return str(notes["run_id"])
        from mlflow.entities import Param

        client = self._client()
        config = self.config
        location = artifacts(config, self.uri)
        run = run_of(client, config.tracking.experiment, location, notes["key"], config.name)
        self._tag(run.info.run_id)
        # MLflow refuses to change a parameter, so those that the run has already are left out.
        new = {k: v for k, v in parameters(self.config).items() if k not in run.data.params}
        for batch in _batches([Param(k, v) for k, v in new.items()], PARAMS):
            client.log_batch(run.info.run_id, params=batch)
        self._note(run_id=run.info.run_id)
        self._running = True
        return str(run.info.run_id)

    def _tag(self, run_id: str) -> None:
        """Set the tags anew, because a resumed run may have other versions of its packages."""
        from mlflow.entities import RunTag

        run_tags = [RunTag(k, v) for k, v in tags(self.config).items()]
        self._client().log_batch(run_id, tags=run_tags)

    def _safely(self, action: Callable[[], object]) -> None:
        """Do something with the store; print the first of several failures and raise none."""
        try:
            action()
            self._away_since = None
        except Exception as error:  # nothing is lost, because metrics.jsonl has everything
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
        """Change values in mlflow.json."""
        old = self._notes() if self._file.exists() else {}
        write_atomically(self._file, json.dumps({**old, **values}))


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cut values into parts of at most `size`."""
    for i in range(0, len(values), size):
        yield values[i : i + size]
