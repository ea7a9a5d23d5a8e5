"""What every actor shares: its device, its threads, its receipts, and errors that say where."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import ObjectLostError

from b2ray.config import Config
from b2ray.errors import ConfigError, RankLost, WorkerError
from b2ray.imports import uncollected
from b2ray.usage import Reading, Usage

if TYPE_CHECKING:
    import torch

    from b2ray.diffusion.policy import Policy

UNBOUND = -1  # the policy version of an actor to which no weights were given yet

# What the driver knows a remedy for, or says in its own words.
UNCHANGED = (WorkerError, ConfigError, RankLost, ObjectLostError)


@dataclass(frozen=True)
class Receipt:
    """The small first result of every call; large results travel beside it, as refs.

    Attributes:
        seconds: that the call took.
        unet_evals: guided evaluations of one latent.
        unet_seconds: of `seconds` those in which the device was at work on the UNet.
        peak: bytes of memory that the process has had at most, as `Memory` has it.
        readings: how busy the worker's machine was since the receipt before.
    """

    role: str
    where: str
    version: int
    seconds: float
    unet_evals: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    unet_seconds: float = 0.0
    peak: int = 0
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class Mark:
    """Where a process stood when a call began."""

    began: float
    unet_evals: int = 0
    unet_seconds: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        node: Ray's id of the node.
        address: of the node, for other nodes.
        port: that was free a moment ago.
        gpus: that Ray reserved.
        log: file that the process's words go to; empty if unknown.
    """

    node: str
    host: str
    pid: int
    address: str
    port: int
    gpus: tuple[str, ...]
    log: str

    def __str__(self) -> str:
        return f"{self.host} (pid {self.pid}, node {self.node[:6]})"


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
    with uncollected():
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


def guarded(doing: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn an exception of an actor's method into a `WorkerError` that crosses processes.

    Those in `UNCHANGED` cross as they are: lost objects are made again, lost ranks replaced.
    """

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except UNCHANGED:
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                raise WorkerError(
                    self.role, where(), doing, cause, traceback.format_exc()
                ) from None

        return call

    return wrap


@dataclass(frozen=True)
class Memory:
    """What a process has used at most of the device it runs on, and what that has, in bytes."""

    where: str
    device: str
    peak: int
    total: int


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

    @guarded("starting")
    def hello(self) -> Receipt:
        """Where this actor is, before anything heavy is loaded."""
        return self.receipt(self.mark(), place=place())

    def memory(self) -> Memory:
        """The largest use of memory so far: the GPU's if this process has one, else its own."""
        import torch

        if _on_gpu():
            name = f"{socket.gethostname()}: {torch.cuda.get_device_name(0)} {_gpu_id()}"
            _, total = torch.cuda.mem_get_info(0)
            return Memory(where(), name, _peak(), total)
        name = f"{socket.gethostname()}: main memory"
        return Memory(where(), name, _peak(), psutil.virtual_memory().total)

    @guarded("timing a call of the UNet")
    def time_call(self, rows: int, backward: bool) -> Receipt:
        """Of an actor that has a policy: the receipt has `seconds` of `diffusion.timing`."""
        from b2ray.diffusion.timing import time_call

        mark = self.mark()
        return self.receipt(mark, seconds=time_call(self.policy, rows, backward))

    def mark(self) -> Mark:
        """Where this process stands now; for `receipt`."""
        policy = getattr(self, "policy", None)
        now = time.perf_counter()
        return Mark(now) if policy is None else Mark(now, policy.unet_evals, policy.clock.seconds)

    def receipt(self, then: Mark, **values: Any) -> Receipt:
        """The receipt of a call that began at a mark."""
        now = self.mark()
        return Receipt(
            self.role,
            where(),
            self.version,
            now.began - then.began,
            now.unet_evals - then.unet_evals,
            values,
            now.unet_seconds - then.unet_seconds,
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
