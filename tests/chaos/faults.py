"""Faults: what happens to the fleet, and at which call."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.slots import Call, Slot, SlotState
from tests.chaos.raylets import Raylets

Action = Callable[[Raylets, Dispatcher, Slot], None]


@dataclass(frozen=True)
class Strike:
    """Something done right after a call was sent, so that it happens during the call.

    Attributes:
        method: the call's.
        action: what is done then.
        stage: not before a unit, or an update, of this stage.
    """

    method: str
    action: Action
    stage: int = 0


@dataclass
class Saboteur:
    """Strikes, each once, in their order, as the dispatcher sends its calls."""

    raylets: Raylets
    strikes: list[Strike]
    struck: list[float] = field(default_factory=list)
    sent: list[tuple[str, str, float]] = field(default_factory=list)  # method, node, time

    def after_send(self, dispatcher: Dispatcher, slot: Slot, call: Call) -> None:
        node = slot.places[0].node if slot.places else ""
        self.sent.append((call.method, node, time.time()))
        if len(self.struck) == len(self.strikes):
            return
        strike = self.strikes[len(self.struck)]
        if call.method != strike.method or _stage(call) < strike.stage:
            return
        self.struck.append(time.time())
        strike.action(self.raylets, dispatcher, slot)


def _stage(call: Call) -> int:
    if call.work is not None:
        return call.work.unit.stage
    return call.requests[0].args[0] if call.method in ("update", "bind") else 0


def kill(process: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(process, number)


def kill_it(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
    """SIGKILL to the process that has the call."""
    kill(slot.places[0].pid)


def kill_last_rank(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
    assert len(slot.places) > 1
    kill(slot.places[-1].pid)


def kill_role(role: str) -> Action:
    def action(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
        for other in dispatcher.roster.ready(role):
            kill(other.places[0].pid)

    return action


def kill_its_node(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
    """The node that has the call; another comes up in its place."""
    raylets.kill(slot.places[0].node)
    raylets.add()


def kill_node_of(role: str) -> Action:
    """The node of a role's first actor; another comes up in its place."""

    def action(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
        slots = dispatcher.roster.slots
        there = next(s for s in slots if s.role.name == role and s.places).places[0].node
        assert there != slot.places[0].node, "the fault is to hit another node than the call's"
        raylets.kill(there)
        raylets.add()

    return action


def drain_its_node(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
    raylets.drain(slot.places[0].node)
    raylets.add()


def pause_scorers_until(ready: Callable[[Dispatcher], bool]) -> Action:
    """Nothing is scored until a condition holds, so that the run cannot end before it."""

    def action(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
        paused = [psutil.Process(s.places[0].pid) for s in dispatcher.roster.ready("scorer")]
        for process in paused:
            process.suspend()
        watch = dispatcher.on_tick

        def until(now: Dispatcher) -> None:
            watch(now)
            if ready(now):
                now.on_tick = watch
                for process in paused:
                    process.resume()

        dispatcher.on_tick = until

    return action


def both(*actions: Action) -> Action:
    def action(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
        for one in actions:
            one(raylets, dispatcher, slot)

    return action


def add_node(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
    raylets.add()


def fill_stores(raylets: Raylets, dispatcher: Dispatcher, slot: Slot) -> None:
    raylets.fill(0.95)


def samplers_ready(count: int) -> Callable[[Dispatcher], bool]:
    def ready(dispatcher: Dispatcher) -> bool:
        there = [s for s in dispatcher.roster.slots if s.role.name == "sampler"]
        return sum(s.state == SlotState.READY for s in there) >= count

    return ready
