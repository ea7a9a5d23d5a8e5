"""A function in several processes that are the ranks of one learner, for tests."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from b2ray.objectives.ranks import Ranks

HANG = 240.0  # seconds after which ranks that have not ended are called hung


def on_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = HANG, late: int = 0
) -> list[Any]:
    """What `function(ranks, *args)` returned in each of `world` processes.

    An exception stands in its rank's place, and None for a rank that was killed. The last `late`
    ranks never come.
    """
    # The children are forks of a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["b2ray.objectives.update", "tests.models"])
    address, started = f"127.0.0.1:{free_port()}", []
    for rank in range(world - late):
        ours, theirs = context.Pipe()
        place = (rank, world, address, timeout)
        process = context.Process(target=_work, args=(theirs, place, function, args), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    until = time.monotonic() + HANG
    try:
        return [_answer(connection, until) for _, connection in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(
    connection: Connection,
    place: tuple[int, int, str, float],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        answer = function(Ranks(*place), *args)
    except Exception as error:
        answer = error
    connection.send(answer)


def _answer(connection: Connection, until: float) -> Any:
    assert connection.poll(max(0.0, until - time.monotonic())), "a rank hangs"
    try:
        return connection.recv()
    except EOFError:
        return None
