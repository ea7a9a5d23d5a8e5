"""What every actor shares: its device, its threads, its receipts, and errors that say where."""

from __future__ import annotations

import functools
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from b2ray.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Receipt:
    """The small first result of every call; large results travel beside it, as refs."""

    role: str
    where: str
    version: int
    seconds: float
    unet_evals: int = 0
    values: dict[str, Any] = field(default_factory=dict)


def where() -> str:
    """This process, as a person would look for it."""
    return f"{socket.gethostname()} (pid {os.getpid()})"


def device(threads: int) -> torch.device:
    """The device that Ray reserved for this actor, the CPU if it reserved none.

    An actor without a reserved GPU still sees every GPU of its machine, hence not
    `torch.cuda.is_available()`.
    """
    import torch

    if ray.is_initialized() and ray.get_gpu_ids() and torch.cuda.is_available():
        # Ray narrows CUDA_VISIBLE_DEVICES to the reserved ones, so the first is ours.
        return torch.device("cuda", 0)
    torch.set_num_threads(threads)
    return torch.device("cpu")


def guarded(doing: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn any exception of an actor's method into a `WorkerError` that crosses processes."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except (WorkerError, ConfigError):
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                raise WorkerError(
                    self.role, where(), doing, cause, traceback.format_exc()
                ) from None

        return call

    return wrap


class Worker:
    """Base of the actors: a role, a policy version, receipts."""

    role = "worker"

    def __init__(self) -> None:
        self.version = -1

    def receipt(self, began: float, unet_evals: int = 0, **values: Any) -> Receipt:
        """The receipt of a call that began at `began` (`time.perf_counter`)."""
        seconds = time.perf_counter() - began
        return Receipt(self.role, where(), self.version, seconds, unet_evals, values)
