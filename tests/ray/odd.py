"""An actor that does what it should not. In a file of its own, which is quick to import."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from b2ray.actors.messages import Answer, Bound
from b2ray.actors.worker import Worker, remote_method
from b2ray.errors import ConfigError


@dataclass(frozen=True)
class Worked(Answer):
    """Work was done by a process."""

    pid: int


class Unborn(Worker):
    """Cannot be made."""

    def __init__(self) -> None:
        raise ImportError("no module named reward_server")


class Late(Worker):
    """Takes its time to start."""

    role = "late"

    def __init__(self) -> None:
        time.sleep(6)
        super().__init__()

    @remote_method("loading")
    def load(self) -> Answer:
        return Answer(self.receipt(self.timer()))


class Odd(Worker):
    """Works, unless told otherwise."""

    role = "odd"

    @remote_method("loading")
    def load(self, rank: int = 0) -> Answer:
        self.rank = rank
        return Answer(self.receipt(self.timer()))

    @remote_method("binding")
    def bind(self, version: int, digest: str) -> Bound:
        self.version = version
        return Bound(self.receipt(self.timer()), digest)

    @remote_method("working")
    def work(self, how: str, note: str = "") -> Answer:
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "die once" and not Path(note).exists():
            Path(note).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "rank 1 dies once":
            if self.rank == 1 and not Path(note).exists():
                Path(note).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.rank == 0 and not Path(note).exists():
                raise ConnectionError("a peer closed the connection")
        if how == "raise":
            raise ZeroDivisionError("a bug")
        if how == "refuse":
            raise ConfigError("sampling.steps is 3: use 4")
        if how == "hang":
            time.sleep(60)
        if how == "different ranks":
            return Bound(self.receipt(self.timer()), f"digest {self.rank}")
        return Worked(self.receipt(self.timer()), os.getpid())
