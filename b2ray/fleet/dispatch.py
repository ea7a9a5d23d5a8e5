"""The dispatcher: one event loop that keeps slots busy, brings them to the current weights,
replaces the dead and gives up with a reason.

It drives a *plan*: something that hands out calls and takes results until it is finished.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, RuntimeEnvSetupError

from b2ray.actors.worker import Receipt
from b2ray.errors import ConfigError, Stopped, WorkerError
from b2ray.fleet.session import StopFlag
from b2ray.fleet.slots import Call, Role, Slot, SlotState, Weights

TICK = 1.0  # seconds between looks at the stop flag and the watchdogs
REPORT_EVERY = 15.0  # seconds between messages about a wait


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
        """Take a call's receipt and the refs of its other results."""
        ...

    def lost(self, call: Call) -> None:
        """An input of the call is gone: make it again before the call is made again."""
        ...


class Dispatcher:
    """All slots of a run and the calls in flight."""

    def __init__(
        self,
        roles: Sequence[Role],
        stop: StopFlag,
        *,
        start_timeout: float,
        stall_timeout: float,
        retries: int,
    ) -> None:
        self.slots = [Slot(role, i) for role in roles for i in range(role.count)]
        self.stop = stop
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout
        self.retries = retries
        self.weights: Weights | None = None
        self.replaced = 0
        self.receipts: list[Receipt] = []  # of `load`, for what a run tells about its actors
        self._calls: dict[Any, tuple[Slot, Call, list[Any]]] = {}
        self._again: deque[Call] = deque()
        self._tries: Counter[str] = Counter()

    def run(self, plan: Plan) -> None:
        """Drive a plan to its end.

        Raises:
            Stopped: a signal asked for it.
            ConfigError: an actor refused the configuration.
            WorkerError: something failed that trying again does not mend, or nothing finishes.
        """
        finished_at = reported_at = time.monotonic()
        self._tries.clear()
        while not plan.finished:
            if self.stop.signal:
                raise Stopped(self.stop.signal)
            self._assign(plan)
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=TICK, fetch_local=False)
            for ref in ready:
                self._settle(ref, plan)
                finished_at = time.monotonic()
            now = time.monotonic()
            if now - max(finished_at, reported_at) > REPORT_EVERY:
                print(f"waiting for: {self._in_flight()}", file=sys.stderr, flush=True)
                reported_at = now
            self._refuse_waits(now - finished_at)

    def close(self) -> None:
        """End the actors."""
        for slot in self.slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        self._calls.clear()

    def ready(self, role: str) -> list[Slot]:
        """The slots of a role that are at the current weights."""
        return [s for s in self.slots if s.role.name == role and s.state == SlotState.READY]

    # --- handing out ---------------------------------------------------------------------------

    def _assign(self, plan: Plan) -> None:
        for slot in self.slots:
            if slot.state == SlotState.DEAD:
                slot.actor = slot.role.make()
                slot.version, slot.busy = -1, False
                slot.enter(SlotState.STARTING)
                self._send(slot, self._load(slot))
            if slot.busy or slot.state == SlotState.STARTING:
                continue
            if self._stale(slot):
                slot.enter(SlotState.SYNCING)
                self._send(slot, self._sync(slot))
                continue
            slot.state = SlotState.READY
            call = self._take_again(slot) or plan.next_call(slot)
            if call is not None:
                self._send(slot, call)

    def _take_again(self, slot: Slot) -> Call | None:
        for call in self._again:
            if call.role == slot.role.name:
                self._again.remove(call)
                return call
        return None

    def _stale(self, slot: Slot) -> bool:
        needs = slot.role.sync_method is not None and self.weights is not None
        return needs and self.weights is not None and slot.version != self.weights.version

    def _load(self, slot: Slot) -> Call:
        return Call(slot.role.name, "load", slot.role.load_args, 1, "loading")

    def _sync(self, slot: Slot) -> Call:
        assert self.weights is not None and slot.role.sync_method is not None
        w = self.weights
        args: tuple[Any, ...] = (w.version, w.lora)
        if slot.role.sync_method == "restore":
            args = (*args, w.optimizer)
        return Call(slot.role.name, slot.role.sync_method, args, 1, f"binding version {w.version}")

    def _send(self, slot: Slot, call: Call) -> None:
        method = getattr(slot.actor, call.method).options(num_returns=call.results)
        refs = method.remote(*call.args)
        refs = refs if isinstance(refs, list) else [refs]
        self._calls[refs[0]] = (slot, call, refs[1:])
        slot.busy = True

    # --- taking back ---------------------------------------------------------------------------

    def _settle(self, ref: Any, plan: Plan) -> None:
        slot, call, results = self._calls.pop(ref)
        slot.busy = False
        try:
            receipt: Receipt = ray.get(ref)
        except RuntimeEnvSetupError as error:
            raise ConfigError(
                f"{slot.role.name}: its runtime_env cannot be set up: {_first_line(error)}"
            ) from error
        except RayActorError as error:
            self._replace(slot, call, error)
        except ObjectLostError as error:
            self._attempt_again(slot, call, error)
            plan.lost(call)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                self._attempt_again(slot, call, error.cause)
                plan.lost(call)
            else:
                raise _reason(slot, call, error) from error
        else:
            self._accept(slot, call, receipt, results, plan)

    def _accept(
        self, slot: Slot, call: Call, receipt: Receipt, results: list[Any], plan: Plan
    ) -> None:
        slot.version = receipt.version
        if call.method == "load":
            slot.enter(SlotState.SYNCING)
            self.receipts.append(receipt)
            return
        if call.method == slot.role.sync_method:
            self._check_digest(slot, receipt)
            return
        slot.failures = 0
        plan.done(call, slot, receipt, results)

    def _check_digest(self, slot: Slot, receipt: Receipt) -> None:
        """Weights that did not arrive are this field's worst bug: they end the run."""
        assert self.weights is not None
        bound = receipt.values["digest"]
        if receipt.version == self.weights.version and bound != self.weights.digest:
            raise WorkerError(
                str(slot),
                receipt.where,
                f"binding policy version {receipt.version}",
                f"bound weights have digest {bound}, the learner's are {self.weights.digest}",
            )

    def _replace(self, slot: Slot, call: Call, error: RayActorError) -> None:
        slot.failures += 1
        slot.enter(SlotState.DEAD)
        self.replaced += 1
        cause = _first_line(error)
        print(f"{slot} died while {call.doing} ({cause}); replacing it", file=sys.stderr)
        if slot.failures > self.retries:
            raise WorkerError(
                str(slot), "its node", call.doing, f"died {slot.failures} times in a row: {cause}"
            )
        if call.method not in ("load", slot.role.sync_method):
            self._attempt_again(slot, call, error)
            self._again.appendleft(call)

    def _attempt_again(self, slot: Slot, call: Call, error: Exception) -> None:
        # What it describes is counted, not the object: a plan may hand out the same work anew.
        self._tries[call.doing] += 1
        # A learner may have died, or lost its data, half-way through an update.
        slot.version = -1
        if self._tries[call.doing] > self.retries:
            raise WorkerError(
                str(slot),
                "any node",
                call.doing,
                f"gave up after {self._tries[call.doing]} tries: {_first_line(error)}",
            )

    # --- watching ------------------------------------------------------------------------------

    def _in_flight(self) -> str:
        now = time.monotonic()
        waits = [
            f"{s} {s.state} for {now - s.since:.0f} s"
            if s.state != SlotState.READY
            else f"{s} {c.doing}"
            for s, c, _ in self._calls.values()
        ]
        return ", ".join(waits) or "nothing"

    def _refuse_waits(self, idle: float) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.state == SlotState.STARTING and now - slot.since > self.start_timeout:
                raise WorkerError(
                    str(slot),
                    "no node yet",
                    "starting",
                    f"not ready after fleet.start_timeout = {self.start_timeout:g} s",
                )
        if idle > self.stall_timeout:
            raise WorkerError(
                "the fleet",
                "all nodes",
                "waiting",
                f"nothing finished for fleet.stall_timeout = {self.stall_timeout:g} s; "
                f"in flight: {self._in_flight()}",
            )


def _reason(slot: Slot, call: Call, error: RayTaskError) -> Exception:
    """The worker's own words for why it failed."""
    cause = error.cause
    if isinstance(cause, ConfigError):
        return ConfigError(str(cause))
    if isinstance(cause, WorkerError):
        return WorkerError(str(slot), cause.where, cause.doing, cause.cause, cause.details)
    return WorkerError(str(slot), "its node", call.doing, _first_line(error), str(error))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
