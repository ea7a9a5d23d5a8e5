"""Joining or starting Ray, and stopping in time when asked to."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from types import FrameType

import psutil
import ray

from b2ray.config import Config
from b2ray.cost import plan_cost
from b2ray.errors import ConfigError
from b2ray.fleet.capacity import needs

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
def session(config: Config, together: int = 1, trains: bool = True) -> Iterator[StopFlag]:
    """Ray for the time of a run: the job's or the named cluster, or one of our own.

    Args:
        together: how many such runs one of our own has to hold.
        trains: whether they need a learner.

    A session that was there before (a test's, a notebook's) is used and left running.
    """
    stop = StopFlag()
    ours = not ray.is_initialized()
    if ours:
        _join_or_start(config, together, trains)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ours:
            ray.shutdown()


def _join_or_start(config: Config, together: int, trains: bool) -> None:
    # A machine without telemetry consent asked for should not send any.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.fleet.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            return
        each = sum((n.most or n.least) * n.together * n.cpus for n in needs(config, trains))
        ray.init(
            address="local",  # never somebody else's Ray on the same machine
            num_cpus=max(os.cpu_count() or 1, math.ceil(each * together)),
            include_dashboard=False,
            object_store_memory=object_store(config, together),
            log_to_driver=False,
            logging_level="error",
        )
    except Exception as error:  # Ray raises it plainly where a node does not start in time
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"Ray cannot be {'joined at ' + address if address else 'started here'}: {reason}"
        ) from error


def object_store(config: Config, together: int = 1) -> int:
    """Bytes of shared memory for Ray started here: two stages of each run, if the machine has them.

    What does not fit, Ray spills to disk.
    """
    wanted = max(MIN_OBJECT_STORE, 2 * plan_cost(config).bytes_per_stage) * together
    return min(wanted, int(0.3 * psutil.virtual_memory().total))
