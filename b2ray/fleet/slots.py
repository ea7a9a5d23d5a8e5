"""Slots: the positions of a role in the fleet, each filled by a team of actors.

A team that is lost is replaced by another, and the slot stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

import ray

from b2ray.actors.messages import Place, Request
from b2ray.actors.worker import UNBOUND
from b2ray.fleet.capacity import ResourceRequest
from b2ray.fleet.nodes import NodeResources


class SlotState(StrEnum):
    """The states of a slot: starting -> loading -> syncing -> ready.

    From any of them it may become dead, and from all but starting draining. A dead slot starts
    again.
    """

    STARTING = "starting"  # its actors are asked for and not yet on a node
    LOADING = "loading"  # they load their models
    SYNCING = "syncing"  # they bind the current weights
    READY = "ready"
    DRAINING = "draining"  # their node is about to be removed: they finish their call
    DEAD = "dead"


@dataclass(frozen=True)
class Team:
    """The actors of a slot. Each call goes to all of them, and ends when all have answered.

    A team has one actor, except for a learner with several ranks, of which member i is rank i.

    Attributes:
        members: handles of the actors.
        end: kills the actors and releases what was reserved for them.
    """

    members: Sequence[Any]
    end: Callable[[], None]


@dataclass(frozen=True)
class Weights:
    """The weights of a policy version, as references to objects.

    Attributes:
        version: the version.
        digest: digest of the LoRA.
        lora: reference to the LoRA.
        optimizer: reference to the optimizer's state.
    """

    version: int
    digest: str
    lora: ray.ObjectRef
    optimizer: ray.ObjectRef


@dataclass(frozen=True)
class Role:
    """A kind of slot.

    Attributes:
        need: its name, the resources of each slot, and how many slots a run needs at least.
        most: returns the number of slots to ask for on the given nodes.
        make: asks Ray for a team, without waiting.
        load: returns the requests that load the members, given where they are.
        bind: returns the request that binds a policy version; None if the role has no weights.
    """

    need: ResourceRequest
    most: Callable[[Sequence[NodeResources]], int]
    make: Callable[[], Team]
    load: Callable[[Sequence[Place]], Sequence[Request]]
    bind: Callable[[Weights], Request] | None = None

    @property
    def name(self) -> str:
        """Such as `sampler`."""
        return self.need.role

    @property
    def least(self) -> int:
        """Number of slots without which the run does not go on."""
        return self.need.least


@dataclass(eq=False)
class Slot:
    """A position of a role, which a team of actors fills.

    Attributes:
        role: the role.
        index: number of the slot in its role.
        state: the state that it is in.
        team: its actors; None before the first ones.
        places: where its actors are; empty while they have no node.
        version: the policy version that its actors have bound.
        busy: whether a call is in flight.
        failures: deaths since it last finished a piece of work.
        since: when it entered its state (`time.monotonic`).
        not_before: when it may start again if it is dead (`time.monotonic`).
        gone_at: when it last lost its actors (`time.monotonic`); None if it never did.
        announced: whether an event has reported these actors as ready.
    """

    role: Role
    index: int
    state: SlotState = SlotState.DEAD
    team: Team | None = None
    places: Sequence[Place] = ()
    version: int = UNBOUND
    busy: bool = False
    failures: int = 0
    since: float = field(default_factory=time.monotonic)
    not_before: float = 0.0
    gone_at: float | None = None
    announced: bool = False

    def __str__(self) -> str:
        return f"{self.role.name} {self.index}"

    def enter(self, state: SlotState) -> None:
        """Change to a state now."""
        self.state, self.since = state, time.monotonic()

    @property
    def where(self) -> str:
        """Where its actors are, for messages."""
        return ", ".join(map(str, self.places)) or "no node yet"

    @property
    def log(self) -> str:
        """The files with the standard error of its actors."""
        return ", ".join(p.log for p in self.places if p.log)


class Purpose(Enum):
    """Why a call is made: for a plan, or for the fleet itself."""

    WORK = "work"  # of a plan
    START = "start"  # to learn where an actor is
    LOAD = "load"
    BIND = "bind"


@dataclass
class Call:
    """A call of every member of a slot's team, whose first result is an `Answer`.

    Attributes:
        role: name of the role whose slots may make it.
        requests: a request for each member, or a single one for all of them.
        doing: what it does, for messages; it identifies the piece of work.
        version: the policy version that the slot must have bound; None: any.
        work: what the plan identifies the call by.
        purpose: why it is made.
        not_before: when it may be tried again (`time.monotonic`).
    """

    role: str
    requests: Sequence[Request]
    doing: str
    version: int | None = None
    work: Any = None
    purpose: Purpose = Purpose.WORK
    not_before: float = 0.0

    @property
    def method(self) -> str:
        """The name of the method that is called."""
        return self.requests[0].method
