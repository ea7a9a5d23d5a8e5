"""Stragglers: slow samplers leave the last calls of a stage to fast ones."""

from __future__ import annotations

import heapq
import statistics
import time


class Stragglers:
    """How fast each sampler is, and whether it should start what little is left of a stage.

    Who does a call changes nothing but time.
    """

    def __init__(self) -> None:
        self._pace: dict[int, float] = {}  # seconds per leaf of a sampler's last branch call
        self._until: dict[int, float] = {}  # when its call in flight should end

    def sent(self, sampler: int, leaves: int) -> None:
        """A branch call is on its way."""
        self._until[sampler] = time.perf_counter() + leaves * self._of(sampler)

    def done(self, sampler: int, leaves: int, seconds: float) -> None:
        """A branch call is over."""
        self._pace[sampler] = seconds / leaves
        self._until.pop(sampler, None)

    def should_take(self, sampler: int, calls: int, leaves: int) -> bool:
        """Whether an idle sampler should take one of the calls that are left.

        The forecast gives each of them to the sampler that would finish it first; a sampler that
        gets none of them should wait. A sampler whose call is overdue is left out.

        Args:
            sampler: the idle one.
            calls: how many are left.
            leaves: of each.
        """
        now = time.perf_counter()
        free = {sampler: now}
        for other, until in self._until.items():
            if now - until < leaves * self._of(other):
                free[other] = max(now, until)
        ends = [(at + leaves * self._of(s), s) for s, at in free.items()]
        heapq.heapify(ends)
        for _ in range(calls):
            end, first = ends[0]
            if first == sampler:
                return True
            heapq.heapreplace(ends, (end + leaves * self._of(first), first))
        return False

    def _of(self, sampler: int) -> float:
        if sampler in self._pace:
            return self._pace[sampler]
        return statistics.median(self._pace.values()) if self._pace else 0.0
