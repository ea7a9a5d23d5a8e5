"""What Ray knows of its nodes and objects. The only place with calls that Ray keeps private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

# Objects below this many bytes may live with their owner, here the driver, and not on a node.
INLINED = 100 * 1024


@dataclass
class Room:
    """What a node has for actors.

    Attributes:
        leaving: it is about to go: it finishes what it does and takes nothing new.
    """

    node: str
    host: str
    cpus: float
    gpus: float
    leaving: bool = False

    def __str__(self) -> str:
        return f"{self.host} {self.node[:6]}: {self.cpus:g} CPU, {self.gpus:g} GPU"


def alive() -> set[str]:
    """Ids of the nodes that live."""
    return {n["NodeID"] for n in ray.nodes() if n["Alive"]}


def draining() -> set[str]:
    """Ids of the nodes that are about to go.

    Ray has no public question for this; where the private one has changed, none drains.
    """
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except (AttributeError, TypeError):
        return set()


def rooms() -> list[Room]:
    """The total room of every node that lives."""
    leaving = draining()
    return [
        Room(
            n["NodeID"],
            n["NodeManagerHostname"],
            n["Resources"].get("CPU", 0.0),
            n["Resources"].get("GPU", 0.0),
            n["NodeID"] in leaving,
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def staying(found: Sequence[Room]) -> list[Room]:
    """Those that are not about to go."""
    return [room for room in found if not room.leaving]


def lost(refs: Sequence[Any]) -> list[bool]:
    """Which of these objects no living node has.

    Where Ray cannot tell, an object counts as lost: making it again costs time, missing it stops
    the run.
    """
    from ray.experimental import get_object_locations

    there = alive()
    try:
        found: Mapping[Any, Mapping[str, Any]] = get_object_locations(list(refs), timeout_ms=10_000)
    except (RuntimeError, TypeError, ray.exceptions.GetTimeoutError):
        return [True] * len(refs)
    return [not _kept(ref, found.get(ref), there) for ref in refs]


def _kept(ref: Any, place: Mapping[str, Any] | None, there: set[str]) -> bool:
    if place is None:
        return False
    if there & set(place["node_ids"]):
        return True
    size = place.get("object_size")
    if size is None or size >= INLINED:
        return False
    try:  # a small one may be the driver's own: it says so at once
        ray.get(ref, timeout=5)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
        return False
    return True
