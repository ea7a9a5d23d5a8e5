"""Slots: the places of the fleet, each filled by an actor that can be replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import ray

from b2ray.branching import WorkUnit


class SlotState(StrEnum):
    """starting -> syncing -> ready; a dead slot starts again with a new actor."""

    STARTING = "starting"
    SYNCING = "syncing"
    READY = "ready"
    DEAD = "dead"


@dataclass(frozen=True)
class Role:
    """A kind of actor: how many, how one is made, and how it gets weights."""

    name: str
    count: int
    make: Callable[[], Any]
    load_args: tuple[Any, ...]
    sync_method: str | None


@dataclass
class Slot:
    """One place of a role."""

    role: Role
    index: int
    state: SlotState = SlotState.DEAD
    actor: Any = None
    version: int = -1
    busy: bool = False
    failures: int = 0  # deaths since it last finished a piece of work
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.role.name} {self.index}"

    def enter(self, state: SlotState) -> None:
        self.state, self.since = state, time.monotonic()


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
