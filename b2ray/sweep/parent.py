"""The parent of a sweep's runs in MLflow, under which its page shows them."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from b2ray.config import Config
from b2ray.discretion import masked
from b2ray.sweep.compare import description
from b2ray.sweep.trials import Plan
from b2ray.tracking.folder import write_atomically
from b2ray.tracking.mlflow_names import PARENT_TAG, origin, tracking_uri
from b2ray.tracking.mlflow_store import client_of, prepare, reason, run_of

LONGEST = 4000  # characters of a tag; stores take 5,000 or more


class ParentRun:
    """One MLflow run for the whole sweep. As with a run's own, it is found again by a tag if its id
    was not written down in time, and a store that is away stops nothing."""

    def __init__(self, plan: Plan) -> None:
        prepare()
        self.plan = plan
        self.config: Config = plan.trials[0].config
        self.uri = tracking_uri(self.config)
        self._file = plan.folder / "mlflow.json"
        if not self._file.exists():
            self._note(key=uuid.uuid4().hex, run_id=None)

    def begin(self) -> str | None:
        """Make the run, or go on with it; its id, None if the store does not answer."""
        return self._safely(self._begin)

    def finish(self, status: str, found: Mapping[str, Any]) -> None:
        """Log what was found and close the run as FINISHED, KILLED or FAILED."""
        self._safely(lambda: self._finish(status, found))

    def _begin(self) -> str:
        client, notes = self._client(), self._notes()
        if notes["run_id"]:
            client.update_run(notes["run_id"], status="RUNNING")
            return str(notes["run_id"])
        experiment, name = self.config.tracking.experiment, self.plan.sweep.name
        run = run_of(client, experiment, self._artifacts(), notes["key"], name)
        # As tags, which may change when the file does; parameters may not.
        for key, value in self._tags().items():
            client.set_tag(run.info.run_id, key, value)
        self._note(run_id=run.info.run_id)
        return str(run.info.run_id)

    def _tags(self) -> dict[str, str]:
        sweep = self.plan.sweep
        varied = {
            **{f: d.model_dump(exclude_none=True) for f, d in sweep.sample.items()},
            **sweep.grid,
        }
        said = {f"b2ray.sweep.{f}": json.dumps(v)[:LONGEST] for f, v in varied.items()}
        asked = {"b2ray.sweep": sweep.name, "b2ray.metric": f"{sweep.mode} {sweep.metric}", **said}
        return origin() | asked

    def _finish(self, status: str, found: Mapping[str, Any]) -> None:
        client, run_id = self._client(), self._begin()
        best = found["settings"][0]
        states = [t["state"] for t in found["trials"]]
        figures = {"trials": len(states), "trials/finished": states.count("finished")}
        figures |= {"trials/failed": states.count("failed")}
        if best["mean"] is not None:
            figures[f"best/{found['metric']}"] = best["mean"]
            client.set_tag(run_id, "b2ray.best", json.dumps(best["values"]))
        for key, value in figures.items():
            client.log_metric(run_id, key, value)
        for file in ("sweep.yaml", "sweep.json"):
            client.log_artifact(run_id, str(self.plan.folder / file))
        self._adopt(client, run_id)
        client.set_tag(run_id, "mlflow.note.content", description(found, LONGEST))
        client.set_terminated(run_id, status)

    def _adopt(self, client: Any, run_id: str) -> None:
        """Those that began while the store was away do not know their parent."""
        for trial in self.plan.trials:
            notes = trial.path / "mlflow.json"
            child = json.loads(notes.read_text())["run_id"] if notes.exists() else None
            if child and PARENT_TAG not in client.get_run(child).data.tags:
                client.set_tag(child, PARENT_TAG, run_id)

    def _client(self) -> Any:
        return client_of(self.uri)

    def _artifacts(self) -> str | None:
        """Beside the runs for our own SQLite file; a server knows where it keeps artifacts."""
        runs = self.plan.folder.parent.resolve()
        own = self.uri == f"sqlite:///{runs / 'mlflow.db'}"
        return (runs / "mlartifacts").as_uri() if own else None

    def _safely(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # any store, any fault: sweep.json has everything
            said = f"MLflow at {masked(self.uri)} does not answer ({reason(error)})"
            print(said, file=sys.stderr)
            return None

    def _notes(self) -> dict[str, Any]:
        return dict(json.loads(self._file.read_text()))

    def _note(self, **values: Any) -> None:
        old = self._notes() if self._file.exists() else {}
        write_atomically(self._file, json.dumps({**old, **values}))
