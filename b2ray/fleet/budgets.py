"""How often the fleet tries again before it gives up, and the first cause it then names."""

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
    """What went wrong, and where."""

    role: str
    where: str
    doing: str
    cause: str
    log: str = ""


@dataclass
class Budgets:
    """Counts of failures: per work, per slot, and of all deaths in a window of time.

    Work is counted by what it does, not by the object that describes it: a plan may hand out the
    same work anew.
    """

    fleet: Fleet
    _tries: Counter[str] = field(default_factory=Counter)
    _deaths: deque[float] = field(default_factory=deque)
    _preemptions: deque[float] = field(default_factory=deque)
    _first: dict[str, Failure] = field(default_factory=dict)

    def worked(self, slot: Slot, call: Call) -> None:
        """A piece of work was finished: its slot and it start from nothing again."""
        slot.failures = 0
        self._first.pop(str(slot), None)
        self._first.pop(call.doing, None)
        self._tries.pop(call.doing, None)

    def died(self, slot: Slot, failure: Failure, *, preempted: bool) -> None:
        """A slot's actors are gone; those of a node that was taken away have their own budget.

        Raises:
            WorkerError: too often in a row, or too many in all.
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
        """A piece of work is to be done again, after a pause that grows.

        Raises:
            WorkerError: it has failed too often.
        """
        self._tries[call.doing] += 1
        first = self._first.setdefault(call.doing, failure)
        tries = self._tries[call.doing]
        if tries > self.fleet.retries:
            _give_up(first, f"the first of {tries} failures of this work")
        call.not_before = time.monotonic() + _pause(tries - 1)

    def _count(self, times: deque[float], most: int, field: str, failure: Failure) -> None:
        first = self._first.setdefault(field, failure)
        now = time.monotonic()
        times.append(now)
        while times[0] < now - self.fleet.death_window:
            times.popleft()
        if len(times) == 1:
            self._first[field] = failure
        elif len(times) > most:
            window = f"{self.fleet.death_window:g} s"
            _give_up(first, f"the first of {len(times)} in {window}, {field} is {most}")


def _pause(times: int) -> float:
    """0 s, 1 s, 2 s, 4 s, …"""
    return min(LONGEST_PAUSE, 2.0 ** (times - 1)) if times else 0.0


def _give_up(first: Failure, what: str) -> NoReturn:
    log = f"; log: {first.log}" if first.log else ""
    raise WorkerError(first.role, first.where, first.doing, f"{first.cause} ({what}{log})")
