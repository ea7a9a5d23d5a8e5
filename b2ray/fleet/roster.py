"""The roster: every slot's life, from asking for its actors to losing them.

starting -> loading -> syncing -> ready, and from anywhere to dead and starting again. Elastic roles
grow and shrink with the nodes; slots on a node that is about to go leave it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray

from b2ray.actors.worker import Memory, Place, Receipt
from b2ray.config import Fleet
from b2ray.errors import WorkerError
from b2ray.fleet import nodes
from b2ray.fleet.budgets import Budgets, Failure
from b2ray.fleet.capacity import Need
from b2ray.fleet.nodes import Room
from b2ray.fleet.slots import Call, Role, Slot, SlotState, Team, Weights

LOOK_EVERY = 1.0  # seconds between questions to Ray about its nodes
GIVE_WAY = 10.0  # seconds that one that is needed looks for room before another makes it
SLOW_START = 60.0  # the same where a node seems to have room, so that its process is only slow


@dataclass(frozen=True)
class Event:
    """Something that happened to a slot.

    Attributes:
        what: `ready`, `died`, `drains` or `left`.
        seconds: from the death or the leaving until ready again, for `ready`.
    """

    time: float
    slot: str
    what: str
    where: str
    doing: str = ""
    cause: str = ""
    seconds: float | None = None

    @property
    def line(self) -> str | None:
        """A line for the screen; None if nobody need know."""
        if self.what == "ready" and self.seconds is not None:
            return f"{self.slot} is back on {self.where} after {self.seconds:.1f} s"
        if self.what == "died":
            return f"{self.slot} died while {self.doing} ({self.cause}); replacing it"
        if self.what == "drains":
            return f"{self.slot} leaves {self.where}, whose node is about to go"
        return None


class Roster:
    """All slots of a run.

    Attributes:
        weights: what the slots of a role are to have bound, by role.
        receipts: of the last `load` of each role.
        replaced: teams that were replaced, by role.
        tell: called with every event.
    """

    def __init__(self, roles: Sequence[Role], patience: Fleet) -> None:
        self.roles, self.patience = roles, patience
        self.budgets = Budgets(patience)
        self.weights: dict[str, Weights] = {}
        self.receipts: dict[str, Receipt] = {}
        self.replaced: Counter[str] = Counter()
        self.tell: Callable[[Event], None] = lambda _: None
        self.slots: list[Slot] = []
        self._looked = self._gave_way = 0.0
        self._resize(nodes.staying(nodes.rooms()))

    def ready(self, role: str) -> list[Slot]:
        """The slots of a role that are at the current weights."""
        return [s for s in self._of(role) if s.state == SlotState.READY and not self.stale(s)]

    def settled(self, patience: float | None = None) -> bool:
        """Whether the least of every role is ready, and of the others all that are loaded.

        With `patience` also those that load, and those that have looked for a node for less than
        so many seconds.
        """

        def waited_for(slot: Slot) -> bool:
            if slot.state == SlotState.READY:
                return self.stale(slot)
            if slot.state in (SlotState.STARTING, SlotState.LOADING, SlotState.DEAD):
                looks = slot.state != SlotState.LOADING
                late = patience is None or (looks and time.monotonic() - slot.since > patience)
                return not late
            return True

        enough = all(len(self.ready(r.name)) >= r.least for r in self.roles)
        return enough and not any(map(waited_for, self.slots))

    def memory(self) -> dict[str, Memory]:
        """The largest use of memory so far of each actor, by its slot."""
        asked = {
            str(slot): slot.team.members[0].memory.remote()
            for slot in self.slots
            if slot.team is not None and slot.state == SlotState.READY
        }
        found = ray.get(list(asked.values()), timeout=self.patience.start_timeout)
        return dict(zip(asked, found, strict=True))

    def close(self) -> None:
        """End all actors."""
        for slot in self.slots:
            if slot.team is not None:
                slot.team.end()

    # --- the life of a slot --------------------------------------------------------------------

    def start(self, slot: Slot) -> Call:
        """Ask for a dead slot's actors; returns the call that tells when they are placed."""
        slot.team, slot.places = slot.role.make(), ()
        slot.version, slot.busy = -1, False
        slot.enter(SlotState.STARTING)
        return Call(slot.role.name, "hello", (), 1, "starting")

    def placed(self, slot: Slot, places: Sequence[Place]) -> Call:
        """Its actors are on nodes; returns the call that loads them. Ranks go by GPU."""
        assert slot.team is not None
        order = sorted(range(len(places)), key=lambda i: (places[i].node, places[i].gpus, i))
        slot.team = Team([slot.team.members[i] for i in order], slot.team.end)
        slot.places = [places[i] for i in order]
        slot.enter(SlotState.LOADING)
        return Call(slot.role.name, "load", (), 1, "loading")

    def loaded(self, slot: Slot, receipt: Receipt) -> None:
        """Its actors have what they need, but for the weights."""
        self.receipts[slot.role.name] = receipt
        if slot.state == SlotState.LOADING:
            slot.enter(SlotState.SYNCING)

    def stale(self, slot: Slot) -> bool:
        """Whether a slot needs other weights before it may work."""
        wanted = self.weights.get(slot.role.name)
        return wanted is not None and slot.version != wanted.version

    def sync(self, slot: Slot) -> Call:
        """The call that brings a slot to its role's weights."""
        assert slot.role.sync_method is not None
        slot.enter(SlotState.SYNCING)
        w = self.weights[slot.role.name]
        restore = slot.role.sync_method == "restore"
        args = (w.version, w.lora, w.optimizer) if restore else (w.version, w.lora)
        return Call(slot.role.name, slot.role.sync_method, args, 1, f"binding version {w.version}")

    def enter_ready(self, slot: Slot) -> None:
        """A slot that can work."""
        if slot.state == SlotState.READY:
            return
        slot.enter(SlotState.READY)
        if not slot.told:
            seconds = None if slot.gone_at is None else time.monotonic() - slot.gone_at
            self._tell(slot, "ready", seconds=seconds)
            slot.told = True

    def leave(self, slot: Slot) -> None:
        """End an idle slot's actors on a node that is about to go; it starts again elsewhere."""
        self._tell(slot, "left")
        self._gone(slot)

    def died(self, slot: Slot, failure: Failure, *, preempted: bool) -> None:
        """A slot's actors are dead or out of reach."""
        self._tell(slot, "died", failure.doing, failure.cause)
        self._gone(slot)
        self.budgets.died(slot, failure, preempted=preempted)

    def _gone(self, slot: Slot) -> None:
        assert slot.team is not None
        slot.team.end()
        self.replaced[slot.role.name] += 1
        slot.gone_at, slot.told, slot.places = time.monotonic(), False, ()
        slot.enter(SlotState.DEAD)

    # --- the nodes -----------------------------------------------------------------------------

    def look(self) -> bool:
        """See to nodes that go or come, and to waits that are too long; not more often than every
        second. Returns whether it did."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return False
        there = nodes.rooms()
        self._leave_nodes(there)
        self._resize(nodes.staying(there))
        self._make_room(nodes.staying(there))
        self._refuse_waits(there)
        self._looked = time.monotonic()
        return True

    def _leave_nodes(self, rooms: Sequence[Room]) -> None:
        alive, leaving = {r.node for r in rooms}, {r.node for r in rooms if r.leaving}
        staying = (SlotState.LOADING, SlotState.SYNCING, SlotState.READY)
        for slot in self.slots:
            on = {p.node for p in slot.places}
            if slot.state in staying and not on <= alive and not slot.busy:
                # A busy one is told by its call.
                cause = "its node is lost"
                failure = Failure(str(slot), slot.where, "waiting for work", cause, slot.log)
                self.died(slot, failure, preempted=False)
            elif slot.state in staying and leaving & on:
                slot.enter(SlotState.DRAINING)
                self._tell(slot, "drains")

    def _resize(self, rooms: Sequence[Room]) -> None:
        """As many slots as each role wants now. Actors that wait for a node that will not come are
        taken back; those that are placed stay until their node goes."""
        for role in self.roles:
            slots, wanted = self._of(role.name), role.most(rooms)
            used = {s.index for s in slots}
            unused = (i for i in range(len(slots) + wanted) if i not in used)
            for _ in range(wanted - len(slots)):
                self.slots.append(Slot(role, next(unused)))
            waiting = [s for s in slots if s.state == SlotState.STARTING]
            for slot in waiting[max(0, len(waiting) - max(0, len(slots) - wanted)) :]:
                assert slot.team is not None
                slot.team.end()
                self.slots.remove(slot)

    def _make_room(self, rooms: Sequence[Room]) -> None:
        """One beyond the least of its role gives way to one that the run needs.

        When a learner's node is lost samplers may have all the GPUs that are left. Where there is
        room somebody else's work may have it, or one of ours that is not placed yet: then later.
        """
        now = time.monotonic()
        placed = Counter(s.role.name for s in self.slots if s.places)
        for slot in self.slots:
            if placed[slot.role.name] >= slot.role.least or slot.state != SlotState.STARTING:
                continue
            patience = SLOW_START if self._has_room(slot.role.need, rooms) else GIVE_WAY
            if now - max(slot.since, self._gave_way) < patience:
                continue
            spare = [s for s in self.slots if s.places and placed[s.role.name] > s.role.least]
            if spare:
                self._tell(spare[-1], "left", cause=f"makes room for {slot}")
                self._gone(spare[-1])
                spare[-1].not_before = now + 2 * GIVE_WAY
                self._gave_way = now
            return

    def _has_room(self, need: Need, rooms: Sequence[Room]) -> bool:
        """Whether a node has room for one more beside our own that are placed there."""
        cpus: dict[str, float] = defaultdict(float)
        gpus: dict[str, float] = defaultdict(float)
        for slot in self.slots:
            for place in slot.places:
                cpus[place.node] += slot.role.need.cpus
                gpus[place.node] += slot.role.need.gpus
        # Fractions such as 0.1 do not add up exactly.
        return any(
            room.cpus - cpus[room.node] > need.together * need.cpus - 1e-6
            and room.gpus - gpus[room.node] > need.together * need.gpus - 1e-6
            for room in rooms
        )

    def _refuse_waits(self, rooms: Sequence[Room]) -> None:
        now, patience = time.monotonic(), self.patience
        for slot in self.slots:
            if slot.state == SlotState.LOADING and now - slot.since > patience.start_timeout:
                raise WorkerError(
                    str(slot),
                    slot.where,
                    "loading",
                    f"not ready after fleet.start_timeout = {patience.start_timeout:g} s; "
                    f"log: {slot.log}",
                )
        limit = max(patience.start_timeout, patience.wait_for_nodes)
        for role in self.roles:
            slots = self._of(role.name)
            waiting = [s for s in slots if s.state == SlotState.STARTING and now - s.since > limit]
            if waiting and sum(bool(s.places) for s in slots) < role.least:
                there = "; ".join(map(str, nodes.staying(rooms))) or "none"
                raise WorkerError(
                    str(waiting[0]),
                    "no node",
                    "starting",
                    f"no node had room for it in {limit:g} s: it asks for {role.need} (nodes: "
                    f"{there})",
                )

    def _of(self, role: str) -> list[Slot]:
        return [s for s in self.slots if s.role.name == role]

    def _tell(
        self,
        slot: Slot,
        what: str,
        doing: str = "",
        cause: str = "",
        seconds: float | None = None,
    ) -> None:
        self.tell(Event(time.time(), str(slot), what, slot.where, doing, cause, seconds))
