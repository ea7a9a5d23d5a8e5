"""An actor that does what it should not. In a file of its own, which is quick to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from b2ray.actors.worker import Receipt, Worker, guarded
from b2ray.errors import ConfigError


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

    @guarded("loading")
    def load(self) -> Receipt:
        return self.receipt(self.mark())


class Odd(Worker):
    """Works, unless told otherwise."""

    role = "odd"

    @guarded("loading")
    def load(self, rank: int = 0) -> Receipt:
        self.rank = rank
        return self.receipt(self.mark())

    @guarded("binding")
    def bind(self, version: int, digest: str) -> Receipt:
        self.version = version
        return self.receipt(self.mark(), digest=digest)

    @guarded("working")
    def work(self, how: str, note: str = "") -> Receipt:
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
            return self.receipt(self.mark(), digest=f"digest {self.rank}")
        return self.receipt(self.mark(), pid=os.getpid())
