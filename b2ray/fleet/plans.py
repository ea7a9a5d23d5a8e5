"""Plans that do not depend on the algorithm: a call, a call of every slot, and waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from b2ray.actors.messages import Answer, Request
from b2ray.errors import WorkerError
from b2ray.fleet.roster import Roster
from b2ray.fleet.slots import Call, Slot

FETCH_WITHIN = 300.0  # seconds in which objects must reach the driver


def fetched(refs: Sequence[Any], what: str, call: Call, slot: Slot) -> list[Any]:
    """Fetch objects that a call returned to the driver.

    Args:
        refs: references to the objects.
        what: what the objects are, for the error message.
        call: the call.
        slot: the slot that made it.

    Raises:
        WorkerError: the objects do not arrive in time.
    """
    try:
        return list(ray.get(list(refs), timeout=FETCH_WITHIN))
    except ray.exceptions.GetTimeoutError as error:
        cause = f"{what} did not reach the driver in {FETCH_WITHIN:g} s"
        raise WorkerError(str(slot), slot.where, call.doing, cause) from error


@dataclass
class SingleCall:
    """A single call of any slot of a role, which is repeated if the slot's actors die.

    Attributes:
        role: name of the role.
        request: the call; it may still be None when the plan is made.
        doing: what the call does, for messages.
        on_answer: called with the answer and the other results. These have been fetched to the
            driver, as the node that made them may be removed.
        answer: the answer; None until there is one.
    """

    role: str
    request: Request | None
    doing: str
    on_answer: Callable[[Answer, Sequence[Any]], object] = lambda *_: None
    answer: Answer | None = None
    _sent: bool = False
    _not_before: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the call has been answered."""
        return self.answer is not None

    def next_call(self, slot: Slot) -> Call | None:
        """The call, if it is not in flight and the slot may make it."""
        if not self._may_send(slot):
            return None
        assert self.request is not None
        self._sent = True
        return Call(self.role, [self.request], self.doing)

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        """Fetch the results and keep the answer."""
        self.on_answer(answer, fetched(results, "its results", call, slot))
        self.answer = answer

    def lost(self, call: Call) -> None:
        """Make the call once more after its pause, as its arguments or results are lost."""
        self._sent, self._not_before = False, call.not_before

    def _may_send(self, slot: Slot) -> bool:
        is_pending = not self._sent and slot.role.name == self.role
        return is_pending and time.monotonic() >= self._not_before


@dataclass
class OnEach:
    """A call of every slot of a role at the same time, repeated by slots whose actors die.

    Attributes:
        role: name of the role.
        slots: how many slots are to answer.
        request: the call.
        doing: what the call does, for messages.
        answers: the answers so far, in the order in which they came.
    """

    role: str
    slots: int
    request: Request
    doing: str
    answers: list[Answer] = field(default_factory=list)
    _called: set[Slot] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        """Whether all slots have answered."""
        return len(self.answers) >= self.slots

    def next_call(self, slot: Slot) -> Call | None:
        """The call, if this slot has not made it yet."""
        if slot.role.name != self.role or slot in self._called:
            return None
        self._called.add(slot)
        return Call(self.role, [self.request], self.doing)

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        """Keep the answer."""
        self.answers.append(answer)

    def lost(self, call: Call) -> None:
        """Let the slots make the call again until there are enough answers."""
        self._called.clear()


@dataclass
class Ready:
    """A plan without calls that waits until the fleet is ready (`Roster.settled`).

    Attributes:
        roster: the slots.
        patience: seconds to wait for slots without which the run could begin; None: not at all.
    """

    roster: Roster
    patience: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the fleet is ready."""
        return self.roster.settled(self.patience)

    def next_call(self, slot: Slot) -> Call | None:
        """None, as the dispatcher itself makes the calls that load and bind."""
        return None

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        """Never called, as there are no calls."""

    def lost(self, call: Call) -> None:
        """Never called, as there are no calls."""
