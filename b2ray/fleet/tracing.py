"""The trace of a stage: what every actor's processor or GPU did, one file for each process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from b2ray.fleet.roster import Roster
from b2ray.fleet.slots import SlotState


class Tracing:
    """Has the actors of a roster traced during one stage.

    Args:
        stage: which, counted from 1 as `step` in metrics.jsonl; None traces nothing.
        patience: seconds that the actors may take to write their traces.
    """

    def __init__(self, roster: Roster, stage: int | None, patience: float) -> None:
        self.roster, self.stage, self.patience = roster, stage, patience
        self._traced: dict[str, Any] = {}  # actor by the name of its file

    def begin(self, stage: int) -> None:
        """Start, if this is the stage: every actor that is ready now."""
        if stage != self.stage:
            return
        for slot in self.roster.slots:
            if slot.team is None or slot.state != SlotState.READY:
                continue
            for rank, member in enumerate(slot.team.members):
                many = len(slot.team.members) > 1
                name = f"{slot}{f' rank {rank}' if many else ''}".replace(" ", "-")
                self._traced[name] = member
        self._each("begin_trace")

    def end(self) -> Mapping[str, bytes]:
        """Stop, if it was started: the traces by actor; one that died since then has none."""
        found = self._each("end_trace")
        self._traced.clear()
        return found

    def _each(self, method: str) -> dict[str, Any]:
        asked = {name: getattr(actor, method).remote() for name, actor in self._traced.items()}
        found = {}
        for name, ref in asked.items():
            try:
                found[name] = ray.get(ref, timeout=self.patience)
            except (RayActorError, ray.exceptions.GetTimeoutError) as error:
                del self._traced[name]
                reason = (str(error).splitlines() or [""])[0]
                print(f"{name} has no trace: {reason}", file=sys.stderr, flush=True)
        return found
