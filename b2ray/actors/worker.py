"""The base of all actors: device, threads, receipts, and errors that say where they happened."""

from __future__ import annotations

import functools
import os
import resource
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import psutil
import ray
from ray.exceptions import ObjectLostError

from b2ray.actors.messages import CallTimed, Memory, Place, Placed, Receipt
from b2ray.actors.system_metrics import Usage
from b2ray.config import Config
from b2ray.errors import ConfigError, RankLost, WorkerError
from b2ray.imports import gc_paused

if TYPE_CHECKING:
    import torch

    from b2ray.diffusion.policy import Policy

P = ParamSpec("P")
R = TypeVar("R")

UNBOUND = -1  # the policy version of an actor to which no weights were given yet

# What the driver knows a remedy for, or says in its own words.
UNCHANGED = (WorkerError, ConfigError, RankLost, ObjectLostError)


@dataclass(frozen=True)
class Timer:
    """What a process had spent when a call began: for the call's receipt."""

    seconds: float
    unet_evals: int = 0
    unet_seconds: float = 0.0


def place() -> Place:
    """Where this actor runs."""
    context = ray.get_runtime_context()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return Place(
        context.get_node_id(),
        socket.gethostname(),
        os.getpid(),
        ray.util.get_node_ip_address(),
        port,
        tuple(map(str, ray.get_gpu_ids())),
        _log_file(),
    )


def _log_file() -> str:
    """Ray points the workers' standard error to a file of its own."""
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return ""


def where() -> str:
    """This process, as a person would look for it."""
    return f"{socket.gethostname()} (pid {os.getpid()})"


def device(threads: int) -> torch.device:
    """The device that Ray reserved for this actor, the CPU if it reserved none.

    An actor without a reserved GPU still sees every GPU of its machine, hence not
    `torch.cuda.is_available()`.
    """
    with gc_paused():
        import torch

    if ray.is_initialized() and ray.get_gpu_ids() and torch.cuda.is_available():
        # Ray narrows CUDA_VISIBLE_DEVICES to the reserved ones, so the first is ours.
        return torch.device("cuda", 0)
    torch.set_num_threads(threads)
    return torch.device("cpu")


def _on_gpu() -> bool:
    """Whether this process has used a GPU."""
    torch = sys.modules.get("torch")  # what has not been imported has not used one
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def _peak() -> int:
    """The largest use of memory so far, in bytes: the GPU's if this process has used one."""
    if _on_gpu():
        return int(sys.modules["torch"].cuda.max_memory_reserved(0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gpu_id() -> str:
    return str(next(iter(ray.get_gpu_ids()), ""))


def remote_method(doing: str, objects: int = 0) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a method that the driver calls, and turn its exceptions into a `WorkerError`.

    A `WorkerError` crosses processes whatever the exception was. Those in `UNCHANGED` cross as they
    are: lost objects are made again, lost ranks replaced.

    Args:
        doing: what the method does, for messages.
        objects: how many results it has beside its answer; a call whose number depends on its
            arguments says so itself (`messages.Request.objects`).
    """

    def wrap(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(*args, **kwargs)
            except UNCHANGED:
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                role = getattr(args[0], "role", "worker")
                raise WorkerError(role, where(), doing, cause, traceback.format_exc()) from None

        call.objects = objects  # type: ignore[attr-defined]
        return call

    return wrap


class Worker:
    """Base of the actors: a role, a policy version, receipts."""

    role = "worker"
    usage: Usage | None = None
    policy: Policy  # of those that have one, once it is loaded

    def __init__(self) -> None:
        self.version = UNBOUND

    def observe(self, config: Config) -> None:
        """From now on read how busy this machine is, unless `tracking.system` is 0."""
        if self.usage is None and config.tracking.system:
            self.usage = Usage(config.tracking.system)

    @remote_method("starting")
    def hello(self) -> Placed:
        """Where this actor is, before anything heavy is loaded."""
        return Placed(self.receipt(self.timer()), place())

    def memory(self) -> Memory:
        """The largest use of memory so far: the GPU's if this process has one, else its own."""
        import torch

        if _on_gpu():
            name = f"{socket.gethostname()}: {torch.cuda.get_device_name(0)} {_gpu_id()}"
            _, total = torch.cuda.mem_get_info(0)
            return Memory(where(), name, _peak(), total)
        name = f"{socket.gethostname()}: main memory"
        return Memory(where(), name, _peak(), psutil.virtual_memory().total)

    @remote_method("timing a call of the UNet")
    def time_call(self, rows: int, backward: bool) -> CallTimed:
        """Seconds of one UNet call of so many latents (`diffusion.timing`).

        Only for actors that have a policy.
        """
        from b2ray.diffusion.timing import time_call

        timer = self.timer()
        seconds = time_call(self.policy, rows, backward)
        return CallTimed(self.receipt(timer), seconds)

    def timer(self) -> Timer:
        """What this process has spent so far; for `receipt`."""
        policy = getattr(self, "policy", None)
        now = time.perf_counter()
        return Timer(now) if policy is None else Timer(now, policy.unet_evals, policy.clock.seconds)

    def receipt(self, began: Timer) -> Receipt:
        """The receipt of a call that began at `began`."""
        now = self.timer()
        return Receipt(
            self.role,
            where(),
            self.version,
            now.seconds - began.seconds,
            now.unet_evals - began.unet_evals,
            now.unet_seconds - began.unet_seconds,
            _peak(),
            self.usage.taken() if self.usage else (),
        )

    def begin_trace(self) -> None:
        """Have torch's profiler note what this process does from now on."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profiler.start()

    def end_trace(self) -> bytes:
        """What it noted: a Chrome trace, JSON, gzipped."""
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            self._profiler.export_chrome_trace(str(file))
            del self._profiler
            return file.read_bytes()
