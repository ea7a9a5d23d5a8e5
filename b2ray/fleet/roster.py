"""The roster: the states of all slots, from asking for their actors to losing them.

A slot goes from starting to loading, syncing and ready. From every state it may become dead, and
starts again. Elastic roles grow and shrink with the number of nodes. Slots on a node that is about
to be removed finish their calls and start again on other nodes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray

from b2ray.actors.messages import Answer, Memory, Place, request
from b2ray.actors.worker import UNBOUND, Worker
from b2ray.config import Fleet
from b2ray.errors import WorkerError
from b2ray.fleet import nodes
from b2ray.fleet.budgets import Budgets, Failure
from b2ray.fleet.capacity import ResourceRequest
from b2ray.fleet.nodes import NodeResources
from b2ray.fleet.slots import Call, Purpose, Role, Slot, SlotState, Team, Weights

LOOK_EVERY = 1.0  # seconds between two looks at the nodes
# Seconds that a required slot waits for a node before a spare slot is ended in its favour.
GIVE_WAY = 10.0
# The same if a node seems to have the resources, as the actor's process may only be slow to start.
SLOW_START = 60.0


@dataclass(frozen=True)
class Event:
    """Something that happened to a slot.

    Attributes:
        time: seconds since 1970.
        slot: such as `sampler 0`.
        what: `ready`, `died`, `drains` or `left`.
        where: where its actors are, or were.
        doing: what it did when it died; else empty.
        cause: why it died or left; else empty.
        seconds: for `ready`, the seconds since it lost its last actors; None for its first ones.
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
        """A line for the screen; None if the event is of no interest to a user."""
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
        budgets: the counts of failures.
        weights: the weights that the slots of a role must have bound, by name of the role.
        loaded_answers: the last answer to `load`, by name of the role.
        replaced: how many teams were replaced, by name of the role.
        slots: the slots of all roles.

    Args:
        roles: the kinds of slots, and how many there are of each.
        settings: budgets of failures and time limits.
        on_event: called with every event.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        settings: Fleet,
        on_event: Callable[[Event], object] = lambda _: None,
    ) -> None:
        self.roles, self.settings = roles, settings
        self.budgets = Budgets(settings)
        self.weights: dict[str, Weights] = {}
        self.loaded_answers: dict[str, Answer] = {}
        self.replaced: Counter[str] = Counter()
        self.slots: list[Slot] = []
        self._on_event = on_event
        self._looked = self._gave_way = 0.0
        self._resize(nodes.staying(nodes.resources()))

    def ready(self, role: str) -> list[Slot]:
        """The slots of a role that are ready and have bound the current weights."""
        return [s for s in self._of(role) if s.state == SlotState.READY and not self.stale(s)]

    def settled(self, patience: float | None = None) -> bool:
        """Whether the fleet is ready to work.

        The least number of slots of every role must be ready, and all others that are loaded.

        Args:
            patience: if given, the answer is no, too, while slots are loading or have waited for a
                node for at most so many seconds.
        """

        def is_awaited(slot: Slot) -> bool:
            if slot.state == SlotState.READY:
                return self.stale(slot)
            if slot.state in (SlotState.STARTING, SlotState.DEAD):
                return patience is not None and time.monotonic() - slot.since <= patience
            if slot.state == SlotState.LOADING:
                return patience is not None
            return True

        has_least = all(len(self.ready(r.name)) >= r.least for r in self.roles)
        return has_least and not any(map(is_awaited, self.slots))

    def memory(self) -> dict[str, Memory]:
        """The peak use of memory of each slot's first actor, by name of the slot."""
        refs = {
            str(slot): slot.team.members[0].memory.remote()
            for slot in self.slots
            if slot.team is not None and slot.state == SlotState.READY
        }
        memories = ray.get(list(refs.values()), timeout=self.settings.start_timeout)
        return dict(zip(refs, memories, strict=True))

    def close(self) -> None:
        """End all actors."""
        for slot in self.slots:
            if slot.team is not None:
                slot.team.end()

    # --- the life of a slot --------------------------------------------------------------------

    def start(self, slot: Slot) -> Call:
        """Ask Ray for actors of a dead slot.

        Returns:
            A call that is answered when the actors are on their nodes.
        """
        slot.team, slot.places = slot.role.make(), ()
        slot.version, slot.busy = UNBOUND, False
        slot.enter(SlotState.STARTING)
        return Call(slot.role.name, [request(Worker.hello)], "starting", purpose=Purpose.START)

    def placed(self, slot: Slot, places: Sequence[Place]) -> Call:
        """Note where a slot's actors are.

        Args:
            slot: the slot.
            places: where each member of its team is.

        Returns:
            The call that loads the actors.
        """
        # Ranks are numbered in the order of their GPUs.
        assert slot.team is not None
        order = sorted(range(len(places)), key=lambda i: (places[i].node, places[i].gpus, i))
        slot.team = Team([slot.team.members[i] for i in order], slot.team.end)
        slot.places = [places[i] for i in order]
        slot.enter(SlotState.LOADING)
        requests = slot.role.load(slot.places)
        return Call(slot.role.name, requests, "loading", purpose=Purpose.LOAD)

    def loaded(self, slot: Slot, answer: Answer) -> None:
        """Note that a slot's actors are loaded, but for the policy's weights."""
        self.loaded_answers[slot.role.name] = answer
        if slot.state == SlotState.LOADING:
            slot.enter(SlotState.SYNCING)

    def stale(self, slot: Slot) -> bool:
        """Whether a slot needs other weights before it may work."""
        weights = self.weights.get(slot.role.name)
        return weights is not None and slot.version != weights.version

    def sync(self, slot: Slot) -> Call:
        """Begin to bind the current weights of a slot's role.

        Returns:
            The call that binds them.
        """
        assert slot.role.bind is not None
        slot.enter(SlotState.SYNCING)
        weights = self.weights[slot.role.name]
        doing = f"binding version {weights.version}"
        return Call(slot.role.name, [slot.role.bind(weights)], doing, purpose=Purpose.BIND)

    def enter_ready(self, slot: Slot) -> None:
        """Note that a slot can work."""
        if slot.state == SlotState.READY:
            return
        slot.enter(SlotState.READY)
        if not slot.announced:
            seconds = None if slot.gone_at is None else time.monotonic() - slot.gone_at
            self._report(slot, "ready", seconds=seconds)
            slot.announced = True

    def leave(self, slot: Slot) -> None:
        """End an idle slot's actors, as their node is about to be removed."""
        self._report(slot, "left")
        self._gone(slot)

    def died(self, slot: Slot, failure: Failure, *, preempted: bool) -> None:
        """Note that a slot's actors are dead or cannot be reached.

        Args:
            slot: the slot.
            failure: how they died.
            preempted: whether their node was taken away.

        Raises:
            WorkerError: a budget of failures is spent.
        """
        self._report(slot, "died", failure.doing, failure.cause)
        self._gone(slot)
        self.budgets.died(slot, failure, preempted=preempted)

    def _gone(self, slot: Slot) -> None:
        """End what is left of a slot's team; the slot is dead then."""
        assert slot.team is not None
        slot.team.end()
        self.replaced[slot.role.name] += 1
        slot.gone_at, slot.announced, slot.places = time.monotonic(), False, ()
        slot.enter(SlotState.DEAD)

    # --- the nodes -----------------------------------------------------------------------------

    def look(self) -> bool:
        """Adapt the slots to the nodes that come and go, and refuse waits that are too long.

        Returns:
            Whether it did so, which is at most once in `LOOK_EVERY` seconds.

        Raises:
            WorkerError: an actor takes too long to load, or there is no node for a required slot.
        """
        if time.monotonic() - self._looked < LOOK_EVERY:
            return False
        cluster = nodes.resources()
        self._leave_nodes(cluster)
        self._resize(nodes.staying(cluster))
        self._make_room(nodes.staying(cluster))
        self._refuse_waits(cluster)
        self._looked = time.monotonic()
        return True

    def _leave_nodes(self, cluster: Sequence[NodeResources]) -> None:
        """Report idle slots that died with their nodes, and drain slots on nodes that will go."""
        alive, leaving = {n.node for n in cluster}, {n.node for n in cluster if n.leaving}
        placed = (SlotState.LOADING, SlotState.SYNCING, SlotState.READY)
        for slot in self.slots:
            slot_nodes = {p.node for p in slot.places}
            if slot.state in placed and not slot_nodes <= alive and not slot.busy:
                # If a slot is busy, its call fails and shows the death.
                cause = "its node is lost"
                failure = Failure(str(slot), slot.where, "waiting for work", cause, slot.log)
                self.died(slot, failure, preempted=False)
            elif slot.state in placed and leaving & slot_nodes:
                slot.enter(SlotState.DRAINING)
                self._report(slot, "drains")

    def _resize(self, cluster: Sequence[NodeResources]) -> None:
        """Give each role the number of slots that it wants on these nodes.

        Only slots without a node are removed; others stay until their node is removed.
        """
        for role in self.roles:
            # Add slots with the smallest free indices.
            slots, target = self._of(role.name), role.most(cluster)
            used = {s.index for s in slots}
            unused = (i for i in range(len(slots) + target) if i not in used)
            for _ in range(target - len(slots)):
                self.slots.append(Slot(role, next(unused)))

            # Remove the last of those that still wait for a node.
            waiting = [s for s in slots if s.state == SlotState.STARTING]
            for slot in waiting[max(0, len(waiting) - max(0, len(slots) - target)) :]:
                assert slot.team is not None
                slot.team.end()
                self.slots.remove(slot)

    def _make_room(self, cluster: Sequence[NodeResources]) -> None:
        """End a spare slot if a required one waits for a node: at most one slot at a time.

        When the learner's node is lost, samplers may hold all GPUs that are left.
        """
        now = time.monotonic()
        placed = Counter(s.role.name for s in self.slots if s.places)
        for slot in self.slots:
            if placed[slot.role.name] >= slot.role.least or slot.state != SlotState.STARTING:
                continue
            # If a node seems to have the resources, another program may use them, or the actor's
            # process is only slow to start.
            patience = SLOW_START if self._has_room(slot.role.need, cluster) else GIVE_WAY
            if now - max(slot.since, self._gave_way) < patience:
                continue
            # One slot may be enough, and Ray needs a moment to use its resources.
            spare = [s for s in self.slots if s.places and placed[s.role.name] > s.role.least]
            if spare:
                self._report(spare[-1], "left", cause=f"makes room for {slot}")
                self._gone(spare[-1])
                spare[-1].not_before = now + 2 * GIVE_WAY
                self._gave_way = now
            return

    def _has_room(self, need: ResourceRequest, cluster: Sequence[NodeResources]) -> bool:
        """Whether a node has the resources of another slot beside the run's own slots on it."""
        cpus: dict[str, float] = defaultdict(float)
        gpus: dict[str, float] = defaultdict(float)
        for slot in self.slots:
            for place in slot.places:
                cpus[place.node] += slot.role.need.cpus
                gpus[place.node] += slot.role.need.gpus
        # Fractions such as 0.1 do not add up exactly.
        return any(
            node.cpus - cpus[node.node] > need.together * need.cpus - 1e-6
            and node.gpus - gpus[node.node] > need.together * need.gpus - 1e-6
            for node in cluster
        )

    def _refuse_waits(self, cluster: Sequence[NodeResources]) -> None:
        """Raise a `WorkerError` if a slot has loaded or waited for a node for too long."""
        now, settings = time.monotonic(), self.settings
        for slot in self.slots:
            if slot.state == SlotState.LOADING and now - slot.since > settings.start_timeout:
                raise WorkerError(
                    str(slot),
                    slot.where,
                    "loading",
                    f"not ready after fleet.start_timeout = {settings.start_timeout:g} s; "
                    f"log: {slot.log}",
                )
        limit = max(settings.start_timeout, settings.wait_for_nodes)
        for role in self.roles:
            slots = self._of(role.name)
            waiting = [s for s in slots if s.state == SlotState.STARTING and now - s.since > limit]
            if waiting and sum(bool(s.places) for s in slots) < role.least:
                total = "; ".join(map(str, nodes.staying(cluster))) or "none"
                raise WorkerError(
                    str(waiting[0]),
                    "no node",
                    "starting",
                    f"no node had room for it in {limit:g} s: it asks for {role.need} (nodes: "
                    f"{total})",
                )

    def _of(self, role: str) -> list[Slot]:
        """The slots of a role."""
        return [s for s in self.slots if s.role.name == role]

    def _report(
        self,
        slot: Slot,
        what: str,
        doing: str = "",
        cause: str = "",
        seconds: float | None = None,
    ) -> None:
        """Report an event of a slot, which happens now."""
        self._on_event(Event(time.time(), str(slot), what, slot.where, doing, cause, seconds))
