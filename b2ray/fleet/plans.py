"""Plans for the learner and for the fleet as a whole; the plan of a rollout is in `rollout.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from b2ray.actors.worker import Receipt
from b2ray.errors import WorkerError
from b2ray.fleet import nodes
from b2ray.fleet.rollout import Rollout
from b2ray.fleet.roster import Roster
from b2ray.fleet.slots import Call, Slot
from b2ray.replay import Kept

FETCH_WITHIN = 300.0  # seconds for what the driver keeps to reach it


def fetched(refs: Sequence[Any], what: str, call: Call, slot: Slot) -> list[Any]:
    """What a call returned, as the driver's.

    Raises:
        WorkerError: it does not arrive in time.
    """
    try:
        return list(ray.get(list(refs), timeout=FETCH_WITHIN))
    except ray.exceptions.GetTimeoutError as error:
        cause = f"{what} did not reach the driver in {FETCH_WITHIN:g} s"
        raise WorkerError(str(slot), slot.where, call.doing, cause) from error


@dataclass
class LearnerCall:
    """One call of the learner. If it dies, a new one at the version before does it again.

    Attributes:
        wanted: how many results it has: the receipt, the LoRA, the optimizer's state.
        taken: called with the receipt and what else was returned, fetched to the driver: the
            learner's node may go, and a commit needs it.
    """

    method: str
    args: tuple[Any, ...]
    doing: str
    wanted: int = 3
    taken: Callable[[Receipt, Sequence[Any]], None] = lambda *_: None
    receipt: Receipt | None = None
    _sent: bool = False
    _not_before: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the learner has answered."""
        return self.receipt is not None

    def next_call(self, slot: Slot) -> Call | None:
        """The call, once."""
        if not self._wanted(slot):
            return None
        self._sent = True
        return Call("learner", self.method, self.args, self.wanted, self.doing)

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Take the answer."""
        self.taken(receipt, fetched(results, "its weights", call, slot))
        self.receipt = receipt

    def lost(self, call: Call) -> None:
        """What it needs or returned is gone: once more, after the pause that the call was given."""
        self._sent, self._not_before = False, call.not_before

    def _wanted(self, slot: Slot) -> bool:
        at_learner = not self._sent and slot.role.name == "learner"
        return at_learner and time.monotonic() >= self._not_before


class Update(LearnerCall):
    """An update on selected leaves of a rollout; leaves that are lost are branched again.

    Drive it together with the rollout.

    Args:
        stage: its number.
        interval: n.
        rollout: the stage's.
        selected: (prompt, advantage, (group, branch)), in the order in which they are trained on.
        max_lag: largest number of versions that a trajectory may be behind.
        taken: as in `LearnerCall`.
        sample_from: called with the version that samplers need: the rollout's while leaves of it
            are made again, and then that of what else is sampled.
        meanwhile: that version.
        replayed: what is trained on again; refs of the driver's own, which no node takes along.
        keep: what the next stage trains on again, this stage's last and with leaves in place of
            trajectories.

    Attributes:
        kept: that, with refs of the driver's own, once the update is finished.
    """

    def __init__(
        self,
        stage: int,
        interval: int,
        rollout: Rollout,
        selected: Sequence[tuple[str, float, tuple[int, int]]],
        max_lag: int,
        taken: Callable[[Receipt, Sequence[Any]], None],
        sample_from: Callable[[int], None] = lambda _: None,
        meanwhile: int = 0,
        replayed: Sequence[Kept] = (),
        keep: Sequence[Kept] = (),
    ) -> None:
        super().__init__("update", (), f"updating on stage {stage}", taken=taken)
        self.rollout, self.selected = rollout, selected
        self._sample_from, self._meanwhile = sample_from, meanwhile
        self._settings = stage, max_lag
        self._interval = interval
        self._replayed, self._keep = list(replayed), list(keep)
        self.kept: list[Kept] = []

    def next_call(self, slot: Slot) -> Call | None:
        """The update, as soon as all its trajectories are there."""
        if not self._wanted(slot) or not self.rollout.finished:
            return None
        self._sample_from(self._meanwhile)
        stage, max_lag = self._settings
        n = self._interval
        entries = [(p, a, n, self.rollout.leaf(*leaf)) for p, a, leaf in self.selected]
        self.args = (stage, entries, max_lag, self._replayed)
        return super().next_call(slot)

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Take the answer. What is kept comes first: until then, lost leaves can be made again."""
        old = [k for k in self._keep if k.stage < self._settings[0]]
        new = self._keep[len(old) :]
        refs = [self.rollout.leaf(*k.trajectory) for k in new]
        found = fetched(refs, "trajectories to be replayed", call, slot) if refs else []
        own = [replace(k, trajectory=ray.put(t)) for k, t in zip(new, found, strict=True)]
        self.kept = [*old, *own]
        super().done(call, slot, receipt, results)

    def lost(self, call: Call) -> None:
        """Trajectories went with their node: those leaves are branched again."""
        super().lost(call)
        leaves = [leaf for _, _, leaf in self.selected]
        gone = nodes.lost([self.rollout.leaf(*leaf) for leaf in leaves])
        if not any(gone):  # the learner misses one, so a node is gone that still counts as alive
            gone = [True] * len(gone)
        self.rollout.again(leaf for leaf, is_gone in zip(leaves, gone, strict=True) if is_gone)
        self._sample_from(self.rollout.version)


@dataclass
class OnEach:
    """One call on every slot of a role at once; where actors die, those in their place do it again.

    Attributes:
        slots: how many there are.
        receipts: of those that have answered, without order.
    """

    role: str
    slots: int
    method: str
    args: tuple[Any, ...]
    doing: str
    receipts: list[Receipt] = field(default_factory=list)
    _asked: set[Slot] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        """Whether all have answered."""
        return len(self.receipts) >= self.slots

    def next_call(self, slot: Slot) -> Call | None:
        """The call, once for each slot."""
        if slot.role.name != self.role or slot in self._asked:
            return None
        self._asked.add(slot)
        return Call(self.role, self.method, self.args, 1, self.doing)

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Take the answer."""
        self.receipts.append(receipt)

    def lost(self, call: Call) -> None:
        """It has no inputs; an answer that did not arrive is asked for again."""
        self._asked.clear()


@dataclass
class Ready:
    """Wait until the fleet is at its weights, as `Roster.settled` has it."""

    roster: Roster
    patience: float | None = None

    @property
    def finished(self) -> bool:
        """Whether it is."""
        return self.roster.settled(self.patience)

    def next_call(self, slot: Slot) -> Call | None:
        """Nothing: loading and binding is the dispatcher's own work."""
        return None

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Never called: nothing was handed out."""

    def lost(self, call: Call) -> None:
        """Never called: nothing was handed out."""
