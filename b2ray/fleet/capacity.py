"""What a run asks of the cluster, and whether the cluster has it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from b2ray.config import Config
from b2ray.errors import ConfigError
from b2ray.fleet import nodes
from b2ray.fleet.nodes import Room

SCORER = "scorer"


@dataclass(frozen=True)
class Need:
    """What a role asks of the cluster, and the field that says so.

    Attributes:
        least: actors without which the run does not go on.
        most: actors that are asked for; None: as many as the nodes have room for.
        together: processes of one actor, all on one node (the learner's ranks).
        cpus: for each process, as `gpus`.
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
        each = f"{self.cpus:g} CPU and {self.gpus:g} GPU"
        return each if self.together == 1 else f"{self.together} times {each} on one node"


def scorers(config: Config) -> dict[str, list[str]]:
    """The names of the rewards that each role of scorers loads, in the order of the rewards."""
    roles: dict[str, list[str]] = {}
    for reward in config.all_rewards:
        own = reward.workers is not None
        roles.setdefault(f"{SCORER} {reward.name}" if own else SCORER, []).append(reward.name)
    return roles


def needs(config: Config, trains: bool = True) -> list[Need]:
    """All that a run asks for; what does not train needs no learner."""
    fleet = config.fleet
    learner, samplers, shared = fleet.learner, fleet.samplers, fleet.scorers
    ranks = config.learner.ranks
    most = None if samplers.max == "auto" else samplers.max
    found = [
        Need("sampler", "fleet.samplers", samplers.min, most, samplers.cpus, samplers.gpus, {}),
    ]
    if trains:
        one = Need("learner", "fleet.learner", 1, 1, learner.cpus, learner.gpus, {}, ranks)
        found.insert(0, one)
    if SCORER in scorers(config):
        n = shared.count
        found.append(Need(SCORER, "fleet.scorers", n, n, shared.cpus, shared.gpus, {}))
    for r in config.all_rewards:
        if r.workers is not None:
            w, role, field = r.workers, f"{SCORER} {r.name}", f"the workers of reward {r.name!r}"
            found.append(Need(role, field, w.count, w.count, w.cpus, w.gpus, w.runtime_env))
    return found


def preflight(config: Config, trains: bool = True) -> None:
    """Refuse a cluster on which the run's actors cannot all be placed, naming what is short.

    With `fleet.wait_for_nodes` nodes may still come: then it only says what is missing.
    """
    there = nodes.staying(nodes.rooms())
    short = shortage(needs(config, trains), there)
    if short is None:
        return
    if config.fleet.wait_for_nodes == 0:
        raise ConfigError(short)
    print(
        f"{short}; waiting {config.fleet.wait_for_nodes:g} s for nodes", file=sys.stderr, flush=True
    )


def shortage(wanted: Sequence[Need], there: Sequence[Room]) -> str | None:
    """The first actor without room, in a sentence; None if all of the least have room."""
    left = _pack([n for n in wanted for _ in range(n.least)], there)
    if isinstance(left, list):
        return None
    total = "; ".join(map(str, there)) or "none"
    number = f" {left.least}" if left.least > 1 else ""
    return (
        f"the cluster has no room for all{number} of {left.role}, each of which asks for {left} "
        f"(nodes: {total}): lower {left.field}, or add nodes"
    )


def room_for(need: Need, wanted: Sequence[Need], there: Sequence[Room]) -> int:
    """How many actors of an elastic need fit beside the least of all others."""
    others = [n for n in wanted if n != need for _ in range(n.least)]
    left = _pack(others, there)
    count = 0
    while isinstance(left, list):
        left = _pack([need], left)
        count += isinstance(left, list)
    return count


def side_by_side(runs: Sequence[Sequence[Need]], there: Sequence[Room]) -> int:
    """How many of these runs, from the first, the nodes hold at once with all that they ask for
    (of what may be any number, the least). 0 if not even one: it may still do with less.
    """
    count = 0
    while count < len(runs) and _fit(runs[: count + 1], None, there):
        count += 1
    return count


def samplers_each(runs: Sequence[Sequence[Need]], there: Sequence[Room]) -> int | None:
    """The most samplers that each of these runs may have, so that none takes what another waits
    for; None if they do not all have room with the least."""
    if not _fit(runs, 0, there):
        return None
    most = 1
    capped = [n for needs in runs for n in needs if n.role == "sampler"]
    while any(n.most is None or n.most > most for n in capped) and _fit(runs, most + 1, there):
        most += 1
    return most


def _fit(runs: Sequence[Sequence[Need]], samplers: int | None, there: Sequence[Room]) -> bool:
    """Whether runs have room side by side, each with no more than so many samplers."""

    def count(n: Need) -> int:
        if samplers is None or n.role != "sampler":
            return n.most or n.least
        return max(n.least, samplers if n.most is None else min(n.most, samplers))

    wanted = [n for needs in runs for n in needs for _ in range(count(n))]
    return isinstance(_pack(wanted, there), list)


def _pack(wanted: Sequence[Need], there: Sequence[Room]) -> list[Room] | Need:
    """The room that is left when each is put on the first node with room, largest first, as Ray
    would have to; or the first that fits nowhere."""
    free = [replace(room) for room in there]
    for need in sorted(wanted, key=lambda n: (n.gpus * n.together, n.cpus), reverse=True):
        gpus, cpus = need.gpus * need.together, need.cpus * need.together
        room = next((r for r in free if _fits(gpus, r.gpus) and _fits(cpus, r.cpus)), None)
        if room is None:
            return need
        room.gpus -= gpus
        room.cpus -= cpus
    return free


def _fits(wanted: float, free: float) -> bool:
    return wanted <= free + 1e-6  # 0.4 + 0.4 + 0.2 is a little more than 1
