"""The dispatcher: the event loop of the fleet.

It drives *plans*, which hand out calls and take their results until they are finished. It keeps the
slots busy, has the current weights bound in them and dead ones replaced, and ends the run with a
reason if that does not help. The states of the slots are kept by the roster.
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
    RuntimeEnvSetupError,
)

from b2ray.actors.messages import Answer, Bound, Placed
from b2ray.actors.system_metrics import Reading
from b2ray.actors.worker import UNBOUND
from b2ray.errors import ConfigError, RankLost, Stopped, WorkerError
from b2ray.fleet.budgets import Failure
from b2ray.fleet.causes import error_of, final_error, first_line, last_line, raised
from b2ray.fleet.roster import Roster
from b2ray.fleet.session import StopFlag
from b2ray.fleet.slots import Call, Purpose, Slot, SlotState, Team

TICK = 1.0  # seconds between looks at the stop flag and the watchdogs
REPORT_EVERY = 15.0  # seconds between messages about a wait
PEERS = 10.0  # seconds in which the other members of a team must say why one of them failed
RETRIED = (ObjectLostError, ObjectStoreFullError)  # after these errors a call is made again


class Plan(Protocol):
    """Work for the fleet, handed out as calls."""

    @property
    def finished(self) -> bool:
        """Whether all work is done."""
        ...

    def next_call(self, slot: Slot) -> Call | None:
        """Hand out a call that this slot can make now; None if there is none."""
        ...

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        """Take the answer to a call and the references to its other results.

        Raises:
            ObjectLostError: a result is lost already, and the call must be made again.
        """
        ...

    def lost(self, call: Call) -> None:
        """Make the inputs of a call again, and then the call, as one of its objects is lost."""
        ...


@dataclass
class Flight:
    """A call in flight.

    Attributes:
        plan: the plan that handed out the call; None for calls of the fleet itself.
        slot: the slot that makes it.
        team: the slot's team when the call was made.
        call: the call.
        refs: a reference to the answer of each member.
        results: references to the other results of the first member.
        answers: the answers that have arrived, by reference.
    """

    plan: Plan | None
    slot: Slot
    team: Team
    call: Call
    refs: list[Any]
    results: list[Any]
    answers: dict[Any, Answer] = field(default_factory=dict)


class Dispatcher:
    """The calls in flight on the slots of a roster.

    Attributes:
        seconds: duration of the last call of each role.
        peaks: peak memory in bytes of the processes of each role.

    Args:
        roster: the slots.
        stop: looked at about every second.
        stall_timeout: the run ends if no call finishes for so many seconds.
        on_tick: called about every second.
        on_readings: called with the system metrics of the actors' machines.
    """

    def __init__(
        self,
        roster: Roster,
        stop: StopFlag,
        stall_timeout: float,
        on_tick: Callable[[Dispatcher], object] = lambda _: None,
        on_readings: Callable[[Sequence[Reading]], object] = lambda _: None,
    ) -> None:
        self.roster, self.stop, self.stall_timeout = roster, stop, stall_timeout
        self.on_tick, self._on_readings = on_tick, on_readings
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._flights: dict[Any, Flight] = {}
        self._again: deque[tuple[Plan, Call]] = deque()
        self._finished_at = self._reported_at = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since the last call finished."""
        return time.monotonic() - self._finished_at

    @property
    def plans(self) -> list[Plan]:
        """The plans that have calls in flight."""
        return list({id(f.plan): f.plan for f in self._flights.values() if f.plan}.values())

    def run(self, *plans: Plan) -> None:
        """Drive plans until all are finished. Earlier plans are asked for calls first.

        Raises:
            Stopped: a signal asked to stop.
            ConfigError: an actor refused the configuration.
            WorkerError: something failed that another try does not mend, or no call finishes.
        """
        self._finished_at = self._reported_at = time.monotonic()
        while True:
            if self.stop.signal:
                raise Stopped(f"stopped by {self.stop.signal}")
            if self.roster.look():
                self._refuse_stall()
                self.on_tick(self)
            self._assign(plans)
            if all(plan.finished for plan in plans):
                return
            if not self._flights:
                time.sleep(0.05)  # all work is in a pause after a failure
                continue
            ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=TICK, fetch_local=False)
            for ref in ready:
                self._settle(ref)
                self._finished_at = time.monotonic()

    # --- handing out ---------------------------------------------------------------------------

    def _assign(self, plans: Sequence[Plan]) -> None:
        """Give every idle slot its next call: of the fleet itself, or of a plan."""
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
        """Give a ready slot a call of a plan, if there is one: first those that failed before."""
        for plan, call in self._again:
            fits = call.version in (None, slot.version)
            if call.role == slot.role.name and now >= call.not_before and fits:
                self._again.remove((plan, call))
                self._send(slot, call, plan)
                return
        for plan in plans:
            next_call = plan.next_call(slot)
            if next_call is not None:
                self._send(slot, next_call, plan)
                return

    def _send(self, slot: Slot, call: Call, plan: Plan | None = None) -> None:
        """Make a call on every member of a slot's team."""
        assert slot.team is not None
        members = slot.team.members
        requests = call.requests if len(call.requests) > 1 else [call.requests[0]] * len(members)
        answers, results = [], []
        for member, request in zip(members, requests, strict=True):
            method = getattr(member, request.method).options(num_returns=1 + request.objects)
            refs = method.remote(*request.args)
            answer, *objects = refs if isinstance(refs, list) else [refs]
            answers.append(answer)
            results.append(objects)
        flight = Flight(plan, slot, slot.team, call, answers, results[0])
        self._flights |= dict.fromkeys(answers, flight)
        slot.busy = True

    # --- taking back ---------------------------------------------------------------------------

    def _settle(self, ref: Any) -> None:
        """Take the answer of a member, or its failure."""
        flight = self._flights.pop(ref)
        if flight.slot not in self.roster.slots:
            return  # the slot was removed before it had a node
        if flight.slot.state == SlotState.DEAD or flight.slot.team is not flight.team:
            self._requeue(flight)  # the team was ended while it worked
            return

        try:
            answer: Answer = ray.get(ref)
        except Exception as error:
            self._fail(flight, self._cause(flight, ref, error))
            return
        flight.answers[ref] = answer
        self._on_readings(answer.receipt.readings)
        if len(flight.answers) == len(flight.refs):
            self._accept(flight)

    def _accept(self, flight: Flight) -> None:
        """Take the answers of all members."""
        slot, call = flight.slot, flight.call
        slot.busy = False
        answers = [flight.answers[ref] for ref in flight.refs]
        receipts = [answer.receipt for answer in answers]
        # The team's answer is that of its first member, with the costs of all members.
        receipt = replace(
            receipts[0],
            unet_evals=sum(r.unet_evals for r in receipts),
            unet_seconds=sum(r.unet_seconds for r in receipts),
        )
        answer = replace(answers[0], receipt=receipt)
        role = slot.role.name
        self.seconds[role] = receipt.seconds
        self.peaks[role] = max(self.peaks.get(role, 0), *(r.peak for r in receipts))

        # Actors that have started load at once.
        if call.purpose == Purpose.START:
            places = [a.place for a in answers if isinstance(a, Placed)]
            self._send(slot, self.roster.placed(slot, places))
            return

        # Weights that were bound must be the learner's.
        slot.version = receipt.version
        self._check_digests(slot, call, answers)
        if call.purpose == Purpose.LOAD:
            self.roster.loaded(slot, answer)
        elif flight.plan is not None:
            try:
                flight.plan.done(call, slot, answer, flight.results)
            except RETRIED as error:
                self._fail(flight, error)
            else:
                self.roster.budgets.worked(slot, call)

    def _requeue(self, flight: Flight) -> None:
        """Queue the call of a plan again, as the team that made it was ended meanwhile."""
        for ref in flight.refs:
            self._flights.pop(ref, None)
        if flight.plan is not None:
            self._again.appendleft((flight.plan, flight.call))

    def _check_digests(self, slot: Slot, call: Call, answers: Sequence[Answer]) -> None:
        """Refuse wrong weights: to sample from them unnoticed would spoil the run.

        Raises:
            WorkerError: the digests are not those of the learner, or differ between ranks.
        """
        digests = {answer.digest for answer in answers if isinstance(answer, Bound)}
        weights = self.roster.weights.get(slot.role.name)
        problem = None
        if len(digests) > 1:
            problem = f"its ranks have different weights: digests {', '.join(sorted(digests))}"
        elif call.purpose == Purpose.BIND and weights and weights.version == slot.version:
            (bound,) = digests
            if bound != weights.digest:
                problem = f"bound weights have digest {bound}, the learner's are {weights.digest}"
        if problem:
            raise WorkerError(str(slot), slot.where, call.doing, problem)

    def _cause(self, flight: Flight, ref: Any, error: Exception) -> Exception:
        """End a flight for all members, and find the first cause of its failure.

        When a rank dies or raises an error, the others soon raise `RankLost`. So the cause is a
        death if there is one, and otherwise an error that is not `RankLost`.

        Args:
            flight: the flight.
            ref: reference to the answer of the member that failed.
            error: what this member raised.
        """
        pending = [r for r in flight.refs if r in self._flights]
        for peer in pending:
            del self._flights[peer]
        errors = [error]
        if pending and not isinstance(error, RayActorError):
            done, _ = ray.wait(pending, num_returns=len(pending), timeout=PEERS, fetch_local=False)
            errors += [e for e in map(error_of, done) if e is not None]

        def rank(e: Exception) -> tuple[bool, bool]:
            return not isinstance(e, RayActorError), isinstance(raised(e), RankLost)

        return min(errors, key=rank)

    def _fail(self, flight: Flight, error: Exception) -> None:
        """Make a failed call again if that may help, and otherwise end the run.

        Raises:
            ConfigError: the configuration is wrong.
            WorkerError: another try does not help, or there were too many.
        """
        slot, call = flight.slot, flight.call
        slot.busy = False
        cause = raised(error)
        failure = Failure(str(slot), slot.where, call.doing, first_line(cause), slot.log)

        # The environment cannot be set up, or the actor's class cannot be created: no retry helps.
        if isinstance(error, RuntimeEnvSetupError):
            raise ConfigError(
                f"{slot.role.name}: its runtime_env cannot be set up: {first_line(error)}"
            ) from error
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise WorkerError(str(slot), slot.where, "starting", last_line(error), str(error))

        # The team is dead: it is replaced, and its work is done by another slot.
        if isinstance(error, RayActorError):
            preempted = slot.state == SlotState.DRAINING or bool(getattr(error, "preempted", False))
            self.roster.died(slot, failure, preempted=preempted)
            if flight.plan is not None:
                if not preempted:
                    self.roster.budgets.again(call, failure)
                self._again.appendleft((flight.plan, call))

        # Data is lost: its plan makes it again. A learner that lost it in the middle of an update
        # must first bind the weights from before the update again.
        elif isinstance(cause, RETRIED) and flight.plan is not None:
            slot.version = UNBOUND
            if slot.team is not None and len(slot.team.members) > 1:
                self.roster.died(slot, failure, preempted=False)  # other ranks wait for this one
            self.roster.budgets.again(call, failure)
            flight.plan.lost(call)

        # A rank is lost, or data in a call of the fleet itself: the team is replaced.
        elif isinstance(cause, (*RETRIED, RankLost)):
            self.roster.died(slot, failure, preempted=False)
            if flight.plan is not None:
                self._again.appendleft((flight.plan, call))

        # Anything else is a bug or bad data.
        else:
            raise final_error(slot, call, error) from error

    # --- watching ------------------------------------------------------------------------------

    def _refuse_stall(self) -> None:
        """Report a long wait, and end the run with a `WorkerError` after one that is too long."""
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
        """What the slots with calls in flight are doing, for messages."""
        now = time.monotonic()
        waits = {
            str(f.slot): f"{f.slot} {f.slot.state} for {now - f.slot.since:.0f} s"
            if f.slot.state != SlotState.READY
            else f"{f.slot} {f.call.doing}"
            for f in self._flights.values()
        }
        return ", ".join(waits.values()) or "nothing"
