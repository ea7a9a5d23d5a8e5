"""Slots: the places of the fleet, each filled by a team of actors that can be replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import ray

from b2ray.actors.worker import Place
from b2ray.branching import WorkUnit
from b2ray.fleet.capacity import Need
from b2ray.fleet.nodes import Room


class SlotState(StrEnum):
    """starting -> loading -> syncing -> ready; draining and dead ones start again elsewhere."""

    STARTING = "starting"  # asked for, not yet on a node
    LOADING = "loading"
    SYNCING = "syncing"
    READY = "ready"
    DRAINING = "draining"  # its node is about to go: it finishes its call
    DEAD = "dead"


@dataclass(frozen=True)
class Team:
    """The actors of one slot. All get every call; it is over when all have answered.

    One actor everywhere but for a learner with several ranks, whose member i is rank i.
    """

    members: Sequence[Any]
    end: Callable[[], None]


@dataclass(frozen=True)
class Role:
    """A kind of slot.

    Attributes:
        least: slots without which the run does not go on.
        most: slots that are asked for, as the cluster is now.
        make: asks Ray for a team, without waiting.
        load_args: arguments of `load` for each member, once it is known where they are.
        need: what each asks of the cluster.
        sync_method: the method that brings a member to a policy version, if it has one.
    """

    name: str
    least: int
    most: Callable[[Sequence[Room]], int]
    make: Callable[[], Team]
    load_args: Callable[[Sequence[Place]], Sequence[tuple[Any, ...]]]
    need: Need
    sync_method: str | None = None


@dataclass(eq=False)
class Slot:
    """One place of a role."""

    role: Role
    index: int
    state: SlotState = SlotState.DEAD
    team: Team | None = None
    places: Sequence[Place] = ()
    version: int = -1
    busy: bool = False
    failures: int = 0  # deaths since it last finished a piece of work
    since: float = field(default_factory=time.monotonic)
    not_before: float = 0.0  # when a dead one may start again
    gone_at: float | None = None  # when it last lost its actors
    told: bool = False  # whether these actors were ready once

    def __str__(self) -> str:
        return f"{self.role.name} {self.index}"

    def enter(self, state: SlotState) -> None:
        self.state, self.since = state, time.monotonic()

    @property
    def where(self) -> str:
        """Where its actors are, as a person would look for them."""
        return ", ".join(map(str, self.places)) or "no node yet"

    @property
    def log(self) -> str:
        """Where its actors' own words are."""
        return ", ".join(p.log for p in self.places if p.log)


@dataclass(frozen=True)
class Weights:
    """A policy version as the fleet passes it on: refs for the arrays, the digest to be met."""

    version: int
    digest: str
    lora: ray.ObjectRef
    optimizer: ray.ObjectRef


@dataclass
class Call:
    """A method call on any slot of a role; its first result is a receipt."""

    role: str
    method: str
    args: tuple[Any, ...]
    results: int
    doing: str
    unit: WorkUnit | None = None
    leaves: tuple[int, int] = (0, 0)
    not_before: float = 0.0  # when it may be tried again
