"""What Ray knows of its nodes and objects; the only module that calls private functions of Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

# Objects of fewer bytes than this may be kept by their owner, here the driver, and not on a node.
INLINED = 100 * 1024


@dataclass
class NodeResources:
    """The resources of a node.

    Attributes:
        node: Ray's id of the node.
        host: name of the machine.
        cpus: logical CPUs.
        gpus: GPUs.
        leaving: whether it is about to be removed: it finishes its work and gets no more.
    """

    node: str
    host: str
    cpus: float
    gpus: float
    leaving: bool = False

    def __str__(self) -> str:
        return f"{self.host} {self.node[:6]}: {self.cpus:g} CPU, {self.gpus:g} GPU"


def alive() -> set[str]:
    """The ids of the nodes that are alive."""
    return {n["NodeID"] for n in ray.nodes() if n["Alive"]}


def draining() -> set[str]:
    """The ids of the nodes that are about to be removed.

    Ray has no public function for this. If the private one has changed, no node counts as such.
    """
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except (AttributeError, TypeError):
        return set()


def resources() -> list[NodeResources]:
    """The resources of every node that is alive, whether they are in use or not."""
    leaving = draining()
    return [
        NodeResources(
            n["NodeID"],
            n["NodeManagerHostname"],
            n["Resources"].get("CPU", 0.0),
            n["Resources"].get("GPU", 0.0),
            n["NodeID"] in leaving,
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def staying(nodes: Sequence[NodeResources]) -> list[NodeResources]:
    """The nodes that are not about to be removed."""
    return [node for node in nodes if not node.leaving]


def lost(refs: Sequence[Any]) -> list[bool]:
    """For each reference, whether its object is on no node that is alive.

    If Ray does not know, the object counts as lost: to compute it again costs time, and to miss it
    would end the run.
    """
    from ray.experimental import get_object_locations

    alive_nodes = alive()
    locations: Mapping[Any, Mapping[str, Any]]
    try:
        locations = get_object_locations(list(refs), timeout_ms=10_000)
    except (RuntimeError, TypeError, ray.exceptions.GetTimeoutError):
        return [True] * len(refs)
    return [not _exists(ref, locations.get(ref), alive_nodes) for ref in refs]


def _exists(ref: Any, location: Mapping[str, Any] | None, alive_nodes: set[str]) -> bool:
    if location is None:
        return False
    if alive_nodes & set(location["node_ids"]):
        return True
    size = location.get("object_size")
    if size is None or size >= INLINED:
        return False
    try:  # the driver may keep a small object itself, and then returns it at once
        ray.get(ref, timeout=5)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
        return False
    return True
