"""Joining or starting Ray, and stopping in time when asked to."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
import ray

from b2ray.config import Config
from b2ray.cost import plan_cost
from b2ray.errors import ConfigError

MIN_OBJECT_STORE = 512 * 2**20  # bytes; a laptop's stages are a few megabytes


class StopFlag:
    """Set by SIGTERM or SIGINT; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> None:
        """Take the signals over. After `ray.init`, which installs handlers of its own."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def session(config: Config) -> Iterator[StopFlag]:
    """Ray for the time of a run: the job's or the named cluster, or one of our own.

    A session that was there before (a test's, a notebook's) is used and left running.
    """
    stop = StopFlag()
    ours = not ray.is_initialized()
    if ours:
        _join_or_start(config)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ours:
            ray.shutdown()


def _join_or_start(config: Config) -> None:
    # A machine without telemetry consent asked for should not send any.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.fleet.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            return
        wanted = sum(need.count * need.cpus for need in needs(config))
        ray.init(
            address="local",  # never somebody else's Ray on the same machine
            num_cpus=max(os.cpu_count() or 1, math.ceil(wanted)),
            include_dashboard=False,
            object_store_memory=object_store(config),
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"Ray cannot be {'joined at ' + address if address else 'started here'}: {reason}"
        ) from error


def object_store(config: Config) -> int:
    """Bytes of shared memory for Ray started here: two stages, if the machine has them.

    What does not fit, Ray spills to disk.
    """
    wanted = max(MIN_OBJECT_STORE, 2 * plan_cost(config).bytes_per_stage)
    return min(wanted, int(0.3 * psutil.virtual_memory().total))


@dataclass(frozen=True)
class Need:
    """What a role asks of the cluster, and the field that says so."""

    role: str
    field: str
    count: int
    cpus: float
    gpus: float
    runtime_env: Mapping[str, Any]


SCORER = "scorer"


def scorers(config: Config) -> dict[str, list[str]]:
    """The names of the rewards that each role of scorers loads, in the order of the rewards."""
    roles: dict[str, list[str]] = {}
    for reward in config.all_rewards:
        own = reward.workers is not None
        roles.setdefault(f"{SCORER} {reward.name}" if own else SCORER, []).append(reward.name)
    return roles


def needs(config: Config) -> list[Need]:
    """All that a run asks for."""
    fleet = config.fleet
    learner, samplers, shared = fleet.learner, fleet.samplers, fleet.scorers
    found = [
        Need("learner", "fleet.learner", 1, learner.cpus, learner.gpus, {}),
        Need("sampler", "fleet.samplers", samplers.count, samplers.cpus, samplers.gpus, {}),
    ]
    if SCORER in scorers(config):
        found.append(Need(SCORER, "fleet.scorers", shared.count, shared.cpus, shared.gpus, {}))
    for r in config.all_rewards:
        if r.workers is not None:
            w, role, field = r.workers, f"{SCORER} {r.name}", f"the workers of reward {r.name!r}"
            found.append(Need(role, field, w.count, w.cpus, w.gpus, w.runtime_env))
    return found


def preflight(config: Config) -> None:
    """Refuse a cluster on which the run's actors cannot all be placed, naming what is short.

    Each actor is put on the first node with room (largest first), as Ray would have to.
    """
    nodes = {n["NodeManagerHostname"]: dict(n["Resources"]) for n in ray.nodes() if n.get("Alive")}
    free = {host: (r.get("GPU", 0.0), r.get("CPU", 0.0)) for host, r in nodes.items()}
    total = ", ".join(f"{host}: {cpu:g} CPU, {gpu:g} GPU" for host, (gpu, cpu) in free.items())
    for need in sorted(needs(config), key=lambda n: n.gpus, reverse=True):
        for placed in range(need.count):
            room = (h for h, (g, c) in free.items() if _fits(need.gpus, g) and _fits(need.cpus, c))
            host = next(room, None)
            if host is None:
                raise ConfigError(
                    f"the cluster has no room for {need.role} {placed + 1} of {need.count}, which "
                    f"asks for {need.cpus:g} CPU and {need.gpus:g} GPU (nodes: {total}): lower "
                    f"{need.field}, or add nodes"
                )
            gpu, cpu = free[host]
            free[host] = (gpu - need.gpus, cpu - need.cpus)


def _fits(wanted: float, free: float) -> bool:
    return wanted <= free + 1e-6  # 0.4 + 0.4 + 0.2 is a little more than 1
