"""The MLflow run of a sweep, beneath which MLflow's page shows the runs of its trials."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from b2ray.config import Config
from b2ray.config.secrets import masked
from b2ray.sweep.compare import description
from b2ray.sweep.trials import SweepPlan
from b2ray.tracking.folder import write_atomically
from b2ray.tracking.mlflow.names import PARENT_TAG, origin, tracking_uri
from b2ray.tracking.mlflow.store import client_of, prepare, reason, run_of

LONGEST = 4000  # the most characters of a tag; stores take at least 5,000


class ParentRun:
    """The MLflow run of a whole sweep.

    As with the MLflow run of a trial, it is found by a tag if the process died before it noted the
    id, and a store that does not answer stops nothing.

    Args:
        plan: the sweep.
    """

    def __init__(self, plan: SweepPlan) -> None:
        prepare()
        self.plan = plan
        self.config: Config = plan.trials[0].config
        self.uri = tracking_uri(self.config)
        self._file = plan.folder / "mlflow.json"
        if not self._file.exists():
            self._note(key=uuid.uuid4().hex, run_id=None)

    def begin(self) -> str | None:
        """Create the MLflow run, or reopen it; return its id, or None if the store is silent."""
        return self._safely(self._begin)

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        """Log the comparison and close the MLflow run.

        Args:
            status: FINISHED, KILLED or FAILED.
            result: what `compare.comparison` returned.
        """
        self._safely(lambda: self._finish(status, result))

    def _begin(self) -> str:
        client, notes = self._client(), self._notes()
        if notes["run_id"]:
            client.update_run(notes["run_id"], status="RUNNING")
            return str(notes["run_id"])
        experiment, name = self.config.tracking.experiment, self.plan.sweep.name
        run = run_of(client, experiment, self._artifacts(), notes["key"], name)
        # They are tags and no parameters, because parameters cannot change when the sweep does.
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
        values = {f"b2ray.sweep.{f}": json.dumps(v)[:LONGEST] for f, v in varied.items()}
        goal = {"b2ray.sweep": sweep.name, "b2ray.metric": f"{sweep.mode} {sweep.metric}"}
        return origin() | goal | values

    def _finish(self, status: str, result: Mapping[str, Any]) -> None:
        client, run_id = self._client(), self._begin()
        best = result["settings"][0]
        states = [t["state"] for t in result["trials"]]
        figures = {"trials": len(states), "trials/finished": states.count("finished")}
        figures |= {"trials/failed": states.count("failed")}
        if best["mean"] is not None:
            figures[f"best/{result['metric']}"] = best["mean"]
            client.set_tag(run_id, "b2ray.best", json.dumps(best["values"]))
        for key, value in figures.items():
            client.log_metric(run_id, key, value)
        for file in ("sweep.yaml", "sweep.json"):
            client.log_artifact(run_id, str(self.plan.folder / file))
        self._adopt(client, run_id)
        client.set_tag(run_id, "mlflow.note.content", description(result, LONGEST))
        client.set_terminated(run_id, status)

    def _adopt(self, client: Any, run_id: str) -> None:
        """Set the parent of trials that began while the store did not answer."""
        for trial in self.plan.trials:
            notes = trial.path / "mlflow.json"
            child = json.loads(notes.read_text())["run_id"] if notes.exists() else None
            if child and PARENT_TAG not in client.get_run(child).data.tags:
                client.set_tag(child, PARENT_TAG, run_id)

    def _client(self) -> Any:
        return client_of(self.uri)

    def _artifacts(self) -> str | None:
        """Return where a new experiment keeps its artifacts; None leaves it to the server."""
        runs = self.plan.folder.parent.resolve()
        is_local = self.uri == f"sqlite:///{runs / 'mlflow.db'}"
        return (runs / "mlartifacts").as_uri() if is_local else None

    def _safely(self, action: Callable[[], Any]) -> Any:
        """Do something with the store; print a failure and return None."""
        try:
            return action()
        except Exception as error:  # nothing is lost, because sweep.json has everything
            message = f"MLflow at {masked(self.uri)} does not answer ({reason(error)})"
            print(message, file=sys.stderr)
            return None

    def _notes(self) -> dict[str, Any]:
        return dict(json.loads(self._file.read_text()))

    def _note(self, **values: Any) -> None:
        """Change values in mlflow.json."""
        old = self._notes() if self._file.exists() else {}
        write_atomically(self._file, json.dumps({**old, **values}))
