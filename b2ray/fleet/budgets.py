"""Budgets of failures: how often the fleet tries again before it gives up with the first cause."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NoReturn

from b2ray.config import Fleet
from b2ray.errors import WorkerError
from b2ray.fleet.slots import Call, Slot

LONGEST_PAUSE = 30.0  # seconds


@dataclass(frozen=True)
class Failure:
    """What went wrong, and where.

    Attributes:
        role: the slot, such as `sampler 0`.
        where: where its actors were.
        doing: what they were doing.
        cause: the exception in one line.
        log: the files with their standard error; empty if unknown.
    """

    role: str
    where: str
    doing: str
    cause: str
    log: str = ""


@dataclass
class Budgets:
    """Counts of failures: of each piece of work, of each slot, and of all slots in a time window.

    A piece of work is identified by `Call.doing`, as a plan may make a new call for the same work.

    Attributes:
        fleet: the settings with the limits.
    """

    fleet: Fleet
    _tries: Counter[str] = field(default_factory=Counter)
    _deaths: deque[float] = field(default_factory=deque)
    _preemptions: deque[float] = field(default_factory=deque)
    _first: dict[str, Failure] = field(default_factory=dict)

    def worked(self, slot: Slot, call: Call) -> None:
        """Reset the counts of a slot and of a piece of work that it has finished."""
        slot.failures = 0
        self._first.pop(str(slot), None)
        self._first.pop(call.doing, None)
        self._tries.pop(call.doing, None)

    def died(self, slot: Slot, failure: Failure, *, preempted: bool) -> None:
        """Count a death of a slot's actors, and set when they may start again.

        Args:
            slot: the slot.
            failure: how the actors died.
            preempted: whether their node was taken away, for which there is a budget of its own.

        Raises:
            WorkerError: the slot died too often in a row, or too many slots died.
        """
        if preempted:
            self._count(
                self._preemptions, self.fleet.max_preemptions, "fleet.max_preemptions", failure
            )
            return
        slot.failures += 1
        first = self._first.setdefault(str(slot), failure)
        self._count(self._deaths, self.fleet.max_deaths, "fleet.max_deaths", failure)
        if slot.failures > self.fleet.retries:
            _give_up(first, f"the first of {slot.failures} deaths in a row")
        slot.not_before = time.monotonic() + _pause(slot.failures - 1)

    def again(self, call: Call, failure: Failure) -> None:
        """Count a failure of a piece of work, and set when it may be tried again.

        Raises:
            WorkerError: the work has failed too often.
        """
        self._tries[call.doing] += 1
        first = self._first.setdefault(call.doing, failure)
        tries = self._tries[call.doing]
        if tries > self.fleet.retries:
            _give_up(first, f"the first of {tries} failures of this work")
        call.not_before = time.monotonic() + _pause(tries - 1)

    def _count(self, times: deque[float], limit: int, field: str, failure: Failure) -> None:
        """Count a failure of any slot.

        Args:
            times: when such failures happened, of which those outside the window are removed.
            limit: how many there may be in the window.
            field: the field that sets the limit.
            failure: the failure.
        """
        first = self._first.setdefault(field, failure)
        now = time.monotonic()
        times.append(now)
        while times[0] < now - self.fleet.death_window:
            times.popleft()
        if len(times) == 1:
            self._first[field] = failure
        elif len(times) > limit:
            window = f"{self.fleet.death_window:g} s"
            _give_up(first, f"the first of {len(times)} in {window}, {field} is {limit}")


def _pause(repeats: int) -> float:
    """Seconds to wait after so many repeated failures: 0, 1, 2, 4, …, at most LONGEST_PAUSE."""
    return min(LONGEST_PAUSE, 2.0 ** (repeats - 1)) if repeats else 0.0


def _give_up(first: Failure, budget: str) -> NoReturn:
    """Raise a `WorkerError` with the first failure and the budget that is spent."""
    log = f"; log: {first.log}" if first.log else ""
    raise WorkerError(first.role, first.where, first.doing, f"{first.cause} ({budget}{log})")
