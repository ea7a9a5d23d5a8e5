"""The resources that roles ask for, and whether the cluster has them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from b2ray.errors import ConfigError
from b2ray.fleet import nodes
from b2ray.fleet.nodes import NodeResources


@dataclass(frozen=True)
class ResourceRequest:
    """The resources that a role asks for.

    Attributes:
        role: name of the role.
        field: the field of the configuration that sets these numbers.
        least: actors without which the run does not go on.
        most: actors that are asked for; None: as many as fit on the nodes.
        cpus: logical CPUs for each process.
        gpus: GPUs, or a fraction of one, for each process.
        runtime_env: Ray's runtime_env for the processes; may be empty.
        together: processes of an actor that must be on the same node (the learner's ranks).
    """

    role: str
    field: str
    least: int
    most: int | None
    cpus: float
    gpus: float
    runtime_env: Mapping[str, Any]
    together: int = 1

    def __str__(self) -> str:
        process = f"{self.cpus:g} CPU and {self.gpus:g} GPU"
        return process if self.together == 1 else f"{self.together} times {process} on one node"


Runs = Sequence[Sequence[ResourceRequest]]  # the requests of each of several runs


def refuse_shortage(requests: Sequence[ResourceRequest], wait_for_nodes: float) -> None:
    """Refuse a cluster that lacks resources for the least number of actors of every role.

    Args:
        requests: the requests of all roles.
        wait_for_nodes: seconds in which more nodes may come. Above 0 the shortage is only printed.

    Raises:
        ConfigError: names the role without resources, and the remedy.
    """
    problem = shortage(requests, nodes.staying(nodes.resources()))
    if problem is None:
        return
    if wait_for_nodes == 0:
        raise ConfigError(problem)
    print(f"{problem}; waiting {wait_for_nodes:g} s for nodes", file=sys.stderr, flush=True)


def shortage(requests: Sequence[ResourceRequest], cluster: Sequence[NodeResources]) -> str | None:
    """Describe the first actor that fits on no node; None if the least of every role fit."""
    packing = _pack([r for r in requests for _ in range(r.least)], cluster)
    if isinstance(packing, list):
        return None
    total = "; ".join(map(str, cluster)) or "none"
    number = f" {packing.least}" if packing.least > 1 else ""
    return (
        f"the cluster has no room for all{number} of {packing.role}, each of which asks for "
        f"{packing} (nodes: {total}): lower {packing.field}, or add nodes"
    )


def room_for(
    request: ResourceRequest, requests: Sequence[ResourceRequest], cluster: Sequence[NodeResources]
) -> int:
    """How many actors of one request fit on the nodes beside the least number of all others.

    Args:
        request: the request of an elastic role.
        requests: the requests of all roles, this one included.
        cluster: the nodes.
    """
    others = [r for r in requests if r != request for _ in range(r.least)]
    packing = _pack(others, cluster)
    count = 0
    while isinstance(packing, list):
        packing = _pack([request], packing)
        count += isinstance(packing, list)
    return count


def side_by_side(runs: Runs, cluster: Sequence[NodeResources]) -> int:
    """How many of these runs, counted from the first, fit on the nodes at the same time.

    Each has as many actors as it asks for, or the least number where it asks for any number. The
    result is 0 if not even the first fits, which may still work with fewer actors.
    """
    count = 0
    while count < len(runs) and _fit(runs[: count + 1], cluster):
        count += 1
    return count


def most_of_each(role: str, runs: Runs, cluster: Sequence[NodeResources]) -> int | None:
    """The most slots of a role that each of these runs may have if all are to fit on the nodes.

    None if not all of them fit even with their least numbers.
    """
    if not _fit(runs, cluster, role, 0):
        return None
    most = 1
    capped = [r for requests in runs for r in requests if r.role == role]
    while any(r.most is None or r.most > most for r in capped):
        if not _fit(runs, cluster, role, most + 1):
            break
        most += 1
    return most


def _fit(runs: Runs, cluster: Sequence[NodeResources], role: str = "", most: int = 0) -> bool:
    """Whether all runs fit on the nodes, each with at most `most` slots of the role."""

    def count(request: ResourceRequest) -> int:
        if request.role != role:
            return request.most or request.least
        cap = most if request.most is None else min(request.most, most)
        return max(request.least, cap)

    actors = [r for requests in runs for r in requests for _ in range(count(r))]
    return isinstance(_pack(actors, cluster), list)


def _pack(
    actors: Sequence[ResourceRequest], cluster: Sequence[NodeResources]
) -> list[NodeResources] | ResourceRequest:
    """Place actors on nodes: the largest first, each on the first node that has room for it.

    Args:
        actors: the request of each actor.
        cluster: the nodes.

    Returns:
        What is free on each node then, or the request of the first actor that fits on no node.
    """
    free = [replace(node) for node in cluster]
    for actor in sorted(actors, key=lambda r: (r.gpus * r.together, r.cpus), reverse=True):
        gpus, cpus = actor.gpus * actor.together, actor.cpus * actor.together
        node = next((n for n in free if _fits(gpus, n.gpus) and _fits(cpus, n.cpus)), None)
        if node is None:
            return actor
        node.gpus -= gpus
        node.cpus -= cpus
    return free


def _fits(amount: float, free: float) -> bool:
    return amount <= free + 1e-6  # 0.4 + 0.4 + 0.2 is a little more than 1
