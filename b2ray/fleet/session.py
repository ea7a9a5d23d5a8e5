"""Join or start Ray, and stop a run when a signal asks for it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import psutil
import ray

from b2ray.errors import ConfigError

MIN_OBJECT_STORE = 512 * 2**20  # bytes


class StopFlag:
    """A flag that SIGTERM or SIGINT sets; a second signal ends the process at once.

    Attributes:
        signal: name of the signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> None:
        """Handle the signals from now on; only after `ray.init`, which sets its own handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


def stop_with_stdin() -> None:
    """Send SIGINT to this process when its standard input ends, so that the run can be resumed.

    The input is a pipe from the sweep that started this trial. The sweep cannot send a signal
    itself: `ray job stop` sends one to every process of the job, and a run takes a second signal as
    the wish to end at once. Besides, a sweep that is killed sends no signal, but closes the pipe.
    """
    # A shell without a terminal makes its background processes ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        # Not SIGTERM, which the run may have received already.
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def session(address: str | None, cpus: float, object_store: int) -> Iterator[StopFlag]:
    """Connect to Ray for the time of a run: to an existing cluster, or to one started here.

    If the process is connected already (a test, a notebook), that connection is used and stays.

    Args:
        address: address of a cluster. None: the one in $RAY_ADDRESS, and without that Ray is
            started here.
        cpus: the least number of CPUs that Ray offers if it is started here.
        object_store: bytes of shared memory for objects if Ray is started here. At most 30 % of the
            machine's memory are used, and other objects are spilled to disk.

    Yields:
        The flag that signals set meanwhile.

    Raises:
        ConfigError: Ray cannot be joined or started.
    """
    stop = StopFlag()
    connects = not ray.is_initialized()
    if connects:
        _join_or_start(address or os.environ.get("RAY_ADDRESS"), cpus, object_store)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if connects:
            ray.shutdown()


def _join_or_start(address: str | None, cpus: float, object_store: int) -> None:
    # Ray must not send usage statistics that nobody agreed to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    memory = min(max(MIN_OBJECT_STORE, object_store), int(0.3 * psutil.virtual_memory().total))
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
            return
        ray.init(
            address="local",  # never another user's Ray on the same machine
            num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
            include_dashboard=False,
            object_store_memory=memory,
            log_to_driver=False,
            logging_level="error",
        )
    except Exception as error:  # Ray raises a plain Exception if a node does not start in time
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"Ray cannot be {'joined at ' + address if address else 'started here'}: {reason}"
        ) from error
