"""The dispatcher: one event loop that keeps slots busy, brings them to the current weights,
replaces the dead and gives up with a reason.

It drives *plans*: things that hand out calls and take results until they are finished. The slots
and their lives are the roster's.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from b2ray.actors.worker import Receipt
from b2ray.errors import ConfigError, RankLost, Stopped, WorkerError
from b2ray.fleet.budgets import Failure
from b2ray.fleet.roster import Roster
from b2ray.fleet.session import StopFlag
from b2ray.fleet.slots import Call, Slot, SlotState, Team
from b2ray.usage import Reading

TICK = 1.0  # seconds between looks at the stop flag and the watchdogs
REPORT_EVERY = 15.0  # seconds between messages about a wait
PEERS = 10.0  # seconds that a team's other members have to say why one failed
RETRIED = (ObjectLostError, ObjectStoreFullError)


class Plan(Protocol):
    """Work for the fleet."""

    @property
    def finished(self) -> bool:
        """Whether everything is done."""
        ...

    def next_call(self, slot: Slot) -> Call | None:
        """A call for this slot, if there is one now."""
        ...

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Take a call's receipt and the refs of its other results.

        Raises:
            ObjectLostError: they are gone already; the call is to be made again.
        """
        ...

    def lost(self, call: Call) -> None:
        """An input of the call is gone: make it again before the call is made again."""
        ...


@dataclass
class Flight:
    """A call that a slot's team is at."""

    plan: Plan | None  # None for loading and binding, which are the dispatcher's own
    slot: Slot
    team: Team
    call: Call
    waiting: list[Any]  # receipts that are not in yet
    results: list[Any]
    receipts: dict[Any, Receipt] = field(default_factory=dict)


class Dispatcher:
    """The calls in flight on the slots of a roster.

    Attributes:
        seconds: that the last call of each role took.
        peaks: bytes of memory that a process of each role has had at most.
        watch: called about every second.
        heard: called with what workers' machines did meanwhile.
    """

    def __init__(self, roster: Roster, stop: StopFlag, stall_timeout: float) -> None:
        self.roster, self.stop, self.stall_timeout = roster, stop, stall_timeout
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.watch: Callable[[Dispatcher], None] = lambda _: None
        self.heard: Callable[[Sequence[Reading]], None] = lambda _: None
        self._flights: dict[Any, Flight] = {}
        self._again: deque[tuple[Plan, Call]] = deque()
        self._finished_at = self._reported_at = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since anything finished."""
        return time.monotonic() - self._finished_at

    @property
    def plans(self) -> list[Plan]:
        """Plans that have calls in flight."""
        return list({id(f.plan): f.plan for f in self._flights.values() if f.plan}.values())

    def run(self, *plans: Plan) -> None:
        """Drive plans to their ends, side by side; earlier ones have their calls first.

        Raises:
            Stopped: a signal asked for it.
            ConfigError: an actor refused the configuration.
            WorkerError: something failed that trying again does not mend, or nothing finishes.
        """
        self._finished_at = self._reported_at = time.monotonic()
        while True:
            if self.stop.signal:
                raise Stopped(self.stop.signal)
            if self.roster.look():
                self._refuse_stall()
                self.watch(self)
            self._assign(plans)
            if all(plan.finished for plan in plans):
                return
            if not self._flights:
                time.sleep(0.05)  # everything waits out a pause
                continue
            ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=TICK, fetch_local=False)
            for ref in ready:
                self._settle(ref)
                self._finished_at = time.monotonic()

    # --- handing out ---------------------------------------------------------------------------

    def _assign(self, plans: Sequence[Plan]) -> None:
        now, roster = time.monotonic(), self.roster
        for slot in roster.slots:
            if slot.state == SlotState.DEAD:
                if now >= slot.not_before:
                    self._send(slot, roster.start(slot))
            elif slot.busy:
                continue
            elif slot.state == SlotState.DRAINING:
                roster.leave(slot)
            elif roster.stale(slot):
                self._send(slot, roster.sync(slot))
            else:
                roster.enter_ready(slot)
                self._work(slot, plans, now)

    def _work(self, slot: Slot, plans: Sequence[Plan], now: float) -> None:
        for plan, call in self._again:
            if call.role == slot.role.name and now >= call.not_before and _fits(slot, call):
                self._again.remove((plan, call))
                self._send(slot, call, plan)
                return
        for plan in plans:
            call_now = plan.next_call(slot)
            if call_now is not None:
                self._send(slot, call_now, plan)
                return

    def _send(self, slot: Slot, call: Call, plan: Plan | None = None) -> None:
        assert slot.team is not None
        members = slot.team.members
        each = (
            slot.role.load_args(slot.places)
            if call.method == "load"
            else [call.args] * len(members)
        )
        receipts, results = [], []
        for member, args in zip(members, each, strict=True):
            refs = getattr(member, call.method).options(num_returns=call.results).remote(*args)
            refs = refs if isinstance(refs, list) else [refs]
            receipts.append(refs[0])
            results.append(refs[1:])
        flight = Flight(plan, slot, slot.team, call, receipts, results[0])
        self._flights |= dict.fromkeys(receipts, flight)
        slot.busy = True

    # --- taking back ---------------------------------------------------------------------------

    def _settle(self, ref: Any) -> None:
        flight = self._flights.pop(ref)
        if flight.slot not in self.roster.slots:
            return  # taken back before it had a place
        if flight.slot.state == SlotState.DEAD or flight.slot.team is not flight.team:
            self._requeue(flight)  # it was ended while it worked
            return
        try:
            flight.receipts[ref] = ray.get(ref)
        except Exception as error:
            self._fail(flight, self._cause(flight, ref, error))
            return
        self.heard(flight.receipts[ref].readings)
        if len(flight.receipts) == len(flight.waiting):
            self._accept(flight)

    def _accept(self, flight: Flight) -> None:
        slot, call = flight.slot, flight.call
        slot.busy = False
        receipts = [flight.receipts[ref] for ref in flight.waiting]
        receipt = replace(
            receipts[0],
            unet_evals=sum(r.unet_evals for r in receipts),
            unet_seconds=sum(r.unet_seconds for r in receipts),
        )
        role = slot.role.name
        self.seconds[role] = receipt.seconds
        self.peaks[role] = max(self.peaks.get(role, 0), *(r.peak for r in receipts))
        if call.method == "hello":
            load = self.roster.placed(slot, [r.values["place"] for r in receipts])
            self._send(slot, load)
            return
        slot.version = receipt.version
        self._check_digests(slot, call, receipts)
        if call.method == "load":
            self.roster.loaded(slot, receipt)
        elif flight.plan is not None:
            try:
                flight.plan.done(call, slot, receipt, flight.results)
            except RETRIED as error:
                self._fail(flight, error)
            else:
                self.roster.budgets.worked(slot, call)

    def _requeue(self, flight: Flight) -> None:
        for ref in flight.waiting:
            self._flights.pop(ref, None)
        if flight.plan is not None:
            self._again.appendleft((flight.plan, flight.call))

    def _check_digests(self, slot: Slot, call: Call, receipts: Sequence[Receipt]) -> None:
        """Weights that did not arrive are this field's worst bug: they end the run."""
        found = {r.values["digest"] for r in receipts if "digest" in r.values}
        wanted = self.roster.weights.get(slot.role.name)
        problem = None
        if len(found) > 1:
            problem = f"its ranks have different weights: digests {', '.join(sorted(found))}"
        elif call.method == slot.role.sync_method and wanted and wanted.version == slot.version:
            bound = next(iter(found))
            if bound != wanted.digest:
                problem = f"bound weights have digest {bound}, the learner's are {wanted.digest}"
        if problem:
            raise WorkerError(str(slot), slot.where, call.doing, problem)

    def _cause(self, flight: Flight, ref: Any, error: Exception) -> Exception:
        """What ended a flight, which is over then for all members.

        When one rank dies or raises, the others soon say that they have lost it. The cause is a
        death if there is one, else what is no such complaint.
        """
        others = [r for r in flight.waiting if r in self._flights]
        for other in others:
            del self._flights[other]
        found = [error]
        if others and not isinstance(error, RayActorError):
            done, _ = ray.wait(others, num_returns=len(others), timeout=PEERS, fetch_local=False)
            found += [e for e in map(_error, done) if e is not None]
        return min(
            found, key=lambda e: (not isinstance(e, RayActorError), isinstance(_inner(e), RankLost))
        )

    def _fail(self, flight: Flight, error: Exception) -> None:
        slot, call = flight.slot, flight.call
        slot.busy = False
        cause = _inner(error)
        failure = Failure(str(slot), slot.where, call.doing, _first_line(cause), slot.log)
        if isinstance(error, RuntimeEnvSetupError):
            raise ConfigError(
                f"{slot.role.name}: its runtime_env cannot be set up: {_first_line(error)}"
            ) from error
        if isinstance(error, RayActorError) and error.actor_init_failed:
            # Its code cannot be imported there: trying again does not mend that.
            raise WorkerError(str(slot), slot.where, "starting", _last_line(error), str(error))
        if isinstance(error, RayActorError):
            preempted = slot.state == SlotState.DRAINING or bool(getattr(error, "preempted", False))
            self.roster.died(slot, failure, preempted=preempted)
            if flight.plan is not None:
                if not preempted:
                    self.roster.budgets.again(call, failure)
                self._again.appendleft((flight.plan, call))
        elif isinstance(cause, RETRIED) and flight.plan is not None:
            # A learner may have lost its data half-way through an update: it starts from the
            # weights before it.
            slot.version = -1
            if slot.team is not None and len(slot.team.members) > 1:
                self.roster.died(slot, failure, preempted=False)  # other ranks wait for this one
            self.roster.budgets.again(call, failure)
            flight.plan.lost(call)
        elif isinstance(cause, (*RETRIED, RankLost)):
            self.roster.died(slot, failure, preempted=False)
            if flight.plan is not None:
                self._again.appendleft((flight.plan, call))
        else:
            raise _reason(slot, call, error) from error

    # --- watching ------------------------------------------------------------------------------

    def _refuse_stall(self) -> None:
        if self.idle > self.stall_timeout:
            raise WorkerError(
                "the fleet",
                "all nodes",
                "waiting",
                f"nothing finished for fleet.stall_timeout = {self.stall_timeout:g} s; "
                f"in flight: {self._in_flight()}",
            )
        now = time.monotonic()
        if now - max(self._finished_at, self._reported_at) > REPORT_EVERY:
            print(f"waiting for: {self._in_flight()}", file=sys.stderr, flush=True)
            self._reported_at = now

    def _in_flight(self) -> str:
        now = time.monotonic()
        waits = {
            str(f.slot): f"{f.slot} {f.slot.state} for {now - f.slot.since:.0f} s"
            if f.slot.state != SlotState.READY
            else f"{f.slot} {f.call.doing}"
            for f in self._flights.values()
        }
        return ", ".join(waits.values()) or "nothing"


def _fits(slot: Slot, call: Call) -> bool:
    """Whether a slot has the policy version that a call is for, if it is for one."""
    versioned = call.unit is not None and slot.role.sync_method is not None
    return not versioned or (call.unit is not None and call.unit.version == slot.version)


def _reason(slot: Slot, call: Call, error: Exception) -> Exception:
    """The worker's own words for why it failed."""
    cause = _inner(error)
    if isinstance(cause, ConfigError):
        return ConfigError(str(cause))
    if isinstance(cause, WorkerError):
        return WorkerError(str(slot), slot.where, cause.doing, cause.cause, cause.details)
    return WorkerError(str(slot), slot.where, call.doing, _first_line(error), str(error))


def _inner(error: Exception) -> Exception:
    """What a worker raised, out of what Ray wraps it in."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def _error(ref: Any) -> Exception | None:
    try:
        ray.get(ref)
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {_lines(error)[0]}"


def _last_line(error: Exception) -> str:
    """Of an exception that Ray prints with its trace: what was raised in the end."""
    return _lines(error)[-1]


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
