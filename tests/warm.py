"""Actor processes that are used again: a run then starts in a tenth of the time.

Nearly all that a run of the small models takes is processes that import torch. Here a process that
has imported everything *becomes* a sampler, a scorer or a learner, of the real class, and is given
back when the run ends. What needs a process of its own (a runtime environment, several ranks on one
node) is started as it always is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import ray

from b2ray.fleet.capacity import ResourceRequest
from b2ray.fleet.slots import Team
from b2ray.fleet.teams import team_maker
from b2ray.imports import gc_paused

USER = "b2ray.rollout.roles"  # the module that makes teams
RELEASED_WITHIN = 3.0  # seconds
IMPORTED = (
    *("b2ray.diffusion.policy", "b2ray.diffusion.timing", "b2ray.objectives.update"),
    *("b2ray.rewards.clip", "transformers", "peft"),
)


class Host:
    """A process that is one actor after another."""

    def __init__(self) -> None:
        with gc_paused():
            for name in IMPORTED:
                importlib.import_module(name)
        self.actor: Any = None

    def become(self, kind: type | None, folder: str | None = None) -> None:
        """Forget the actor that this process was, and be a new one of a class, or none.

        Args:
            folder: the working directory from now on.
        """
        usage = getattr(self.actor, "usage", None)
        if usage is not None:
            usage.stop()
        self.actor = None
        gc.collect()
        if folder:
            os.chdir(folder)
        if kind is not None:
            self.actor = kind()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method)(*args)


class Method:
    """A method of the actor that a host is, called as Ray's own handles are."""

    def __init__(self, host: Any, name: str, results: int = 1) -> None:
        self.host, self.name, self.results = host, name, results

    def options(self, num_returns: int) -> Method:
        return Method(self.host, self.name, num_returns)

    def remote(self, *args: Any) -> Any:
        return self.host.call.options(num_returns=self.results).remote(self.name, *args)


class Handle:
    """A host in the place of an actor's handle."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Method:
        return Method(self._host, name)


class Pool:
    """The hosts of one Ray session.

    Attributes:
        started: how many processes were started.
    """

    def __init__(self) -> None:
        self.started = 0
        self._released: list[tuple[Any, Any]] = []  # host, ref of its release

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Inside, runs of this process take their actors from the pool."""
        with mock.patch(f"{USER}.team_maker", self.maker):
            yield

    def maker(self, actor: type, need: ResourceRequest) -> Callable[[], Team]:
        """As `b2ray.fleet.teams.team_maker`."""
        if need.together > 1 or need.runtime_env:
            return team_maker(actor, need)
        return lambda: self._team(actor)

    def _team(self, actor: type) -> Team:
        host = self._idle() or self._new()
        host.become.remote(actor, os.getcwd())
        return Team([Handle(host)], lambda: self._release(host))

    def _new(self) -> Any:
        self.started += 1
        return ray.remote(max_restarts=0, num_cpus=0)(Host).remote()

    def _release(self, host: Any) -> None:
        self._released.append((host, host.become.remote(None)))

    def _idle(self) -> Any:
        """A host that has done all that it was asked; those that have died are forgotten.

        Waits a little for one that is about to be ready: another process would take longer.
        """
        while self._released:
            refs = [ref for _, ref in self._released]
            done, _ = ray.wait(refs, timeout=RELEASED_WITHIN)
            if not done:
                return None
            host, ref = self._released.pop(refs.index(done[0]))
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(ref)
                return host
        return None
