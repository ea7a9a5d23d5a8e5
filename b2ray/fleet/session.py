"""Joining or starting Ray, and stopping in time when asked to."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from types import FrameType

import ray

from b2ray.config import Fleet
from b2ray.errors import ConfigError

LOCAL_OBJECT_STORE = 512 * 2**20  # bytes; a laptop's stages are a few megabytes


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
def session(fleet: Fleet) -> Iterator[StopFlag]:
    """Ray for the time of a run: the job's or the named cluster, or one of our own.

    A session that was there before (a test's, a notebook's) is used and left running.
    """
    stop = StopFlag()
    ours = not ray.is_initialized()
    if ours:
        _join_or_start(fleet)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ours:
            ray.shutdown()


def _join_or_start(fleet: Fleet) -> None:
    # A machine without telemetry consent asked for should not send any.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = fleet.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            return
        wanted = sum(count * cpus for _, count, cpus, _ in shapes(fleet))
        ray.init(
            address="local",  # never somebody else's Ray on the same machine
            num_cpus=max(os.cpu_count() or 1, math.ceil(wanted)),
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE,
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"Ray cannot be {'joined at ' + address if address else 'started here'}: {reason}"
        ) from error


def shapes(fleet: Fleet) -> list[tuple[str, int, float, float]]:
    """(role, actors, CPUs each, GPUs each) that a run asks for."""
    return [
        ("learner", 1, fleet.learner.cpus, fleet.learner.gpus),
        ("sampler", fleet.samplers.count, fleet.samplers.cpus, fleet.samplers.gpus),
        ("scorer", fleet.scorers.count, fleet.scorers.cpus, fleet.scorers.gpus),
    ]


def preflight(fleet: Fleet) -> None:
    """Refuse a cluster on which the run's actors cannot all be placed, naming what is short.

    Each actor is put on the first node with room (largest first), as Ray would have to.
    """
    nodes = {n["NodeManagerHostname"]: dict(n["Resources"]) for n in ray.nodes() if n.get("Alive")}
    free = {host: (r.get("GPU", 0.0), r.get("CPU", 0.0)) for host, r in nodes.items()}
    total = ", ".join(f"{host}: {cpu:g} CPU, {gpu:g} GPU" for host, (gpu, cpu) in free.items())
    for role, count, cpus, gpus in sorted(shapes(fleet), key=lambda s: s[3], reverse=True):
        for placed in range(count):
            room = (h for h, (gpu, cpu) in free.items() if gpu >= gpus and cpu >= cpus)
            host = next(room, None)
            if host is None:
                raise ConfigError(
                    f"the cluster has no room for {role} {placed + 1} of {count}, which asks for "
                    f"{cpus:g} CPU and {gpus:g} GPU (nodes: {total}): lower fleet.{role}"
                    f"{'' if role == 'learner' else 's'}, or add nodes"
                )
            gpu, cpu = free[host]
            free[host] = (gpu - gpus, cpu - cpus)
