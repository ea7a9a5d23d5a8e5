"""The trace of a stage: what the processor or GPU of every actor did, in a file for each actor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from b2ray.fleet.roster import Roster
from b2ray.fleet.slots import SlotState


class Tracing:
    """Traces the actors of a roster during a stage.

    Args:
        roster: the slots.
        stage: number of the stage, counted from 1 like `step` in metrics.jsonl; None: no stage is
            traced.
        patience: seconds that the actors may take to write their traces.
    """

    def __init__(self, roster: Roster, stage: int | None, patience: float) -> None:
        self.roster, self.stage, self.patience = roster, stage, patience
        self._traced: dict[str, Any] = {}  # actors that are being traced, by names of their files

    def begin(self, stage: int) -> None:
        """Start tracing all actors that are ready now, if this is the stage to trace."""
        if stage != self.stage:
            return
        for slot in self.roster.slots:
            if slot.team is None or slot.state != SlotState.READY:
                continue
            has_ranks = len(slot.team.members) > 1
            for rank, member in enumerate(slot.team.members):
                name = f"{slot}{f' rank {rank}' if has_ranks else ''}".replace(" ", "-")
                self._traced[name] = member
        self._call("begin_trace")

    def end(self) -> Mapping[str, bytes]:
        """Stop tracing.

        Returns:
            The trace of each actor by the name of its file. There are none if no tracing was
            started, and an actor that has died since has none.
        """
        traces = self._call("end_trace")
        self._traced.clear()
        return traces

    def _call(self, method: str) -> dict[str, Any]:
        """Call a method of all traced actors, and stop tracing those that do not answer."""
        refs = {name: getattr(actor, method).remote() for name, actor in self._traced.items()}
        results = {}
        for name, ref in refs.items():
            try:
                results[name] = ray.get(ref, timeout=self.patience)
            except (RayActorError, ray.exceptions.GetTimeoutError) as error:
                del self._traced[name]
                reason = (str(error).splitlines() or [""])[0]
                print(f"{name} has no trace: {reason}", file=sys.stderr, flush=True)
        return results
