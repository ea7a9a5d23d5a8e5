"""Prefixes that serve in several stages: made by samplers, kept as objects of the driver's own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from b2ray.actors.worker import Receipt
from b2ray.branching import WorkUnit, cut
from b2ray.config import Config
from b2ray.diffusion.noise import Domain
from b2ray.diffusion.trajectory import Prefix
from b2ray.fleet.plans import fetched
from b2ray.fleet.slots import Call, Slot
from b2ray.prefixes import Origin, Pool, kept_from, needed
from b2ray.prompts import PromptSet


class Making:
    """A plan: denoise prefixes, unit by unit, and take them over from the samplers.

    Args:
        units: their groups are named by (stage, index).
        first: the earliest step at which they are to be forked.

    Attributes:
        made: (stage, group) -> ref of a `Prefix`, an object of the driver's own.
        began: when the first call was handed out; before that None.
    """

    def __init__(self, units: Sequence[WorkUnit], first: int) -> None:
        self.made: dict[Origin, Any] = {}
        self.unet_evals, self.unet_seconds = 0, 0.0
        self.bytes = 0
        self.began: float | None = None
        self._version, self._first = units[0].version, first
        self._left = deque(units)
        self._open = len(units)

    @property
    def finished(self) -> bool:
        """Whether all are made."""
        return not self._open

    def next_call(self, slot: Slot) -> Call | None:
        """The next unit, for a sampler."""
        if slot.role.name != "sampler" or slot.version != self._version or not self._left:
            return None
        self.began = self.began or time.perf_counter()
        unit = self._left.popleft()
        doing = f"denoising the prefixes of unit {unit.index} of stage {unit.stage}"
        args, results = (unit, self._first), 1 + len(unit.groups)
        return Call("sampler", "denoise_prefixes", args, results, doing, unit)

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Take them over: an object of the sampler's would go with its node, and a commit needs it.

        The driver passes them on to its node's store and keeps the refs.
        """
        assert call.unit is not None
        found = fetched(results, "prefixes", call, slot)
        for group, prefix in zip(call.unit.groups, found, strict=True):
            self.made[call.unit.stage, group.index] = ray.put(prefix)
        self.unet_evals += receipt.unet_evals
        self.unet_seconds += receipt.unet_seconds
        self.bytes += receipt.values.get("bytes", 0)
        self._open -= 1

    def lost(self, call: Call) -> None:
        """They went before the driver had them: once more, from the same seeds."""
        assert call.unit is not None
        self._left.appendleft(call.unit)


class Prefixes:
    """The prefixes that serve again, by (stage, group) for which they were made."""

    def __init__(self, config: Config, prompts: PromptSet) -> None:
        self.config, self.pool = config, Pool(config, prompts)
        self._refs: dict[Origin, Any] = {}

    def making(self, units: Sequence[WorkUnit], fork: int) -> Making | None:
        """What is to be made before a stage's units can be branched, if anything.

        Prefixes are made in the units of the stage for which they are made, whenever that is: in a
        batch of other prefixes they would round differently.

        Args:
            units: of one stage and version.
            fork: the latest step at which they are to be forked.
        """
        config, version = self.config, units[0].version
        absent = {g.prefix for u in units for g in u.groups if g.prefix} - self._refs.keys()
        if not absent:
            return None
        work: list[WorkUnit] = []
        for stage in sorted({stage for stage, _ in absent}):
            of_stage = cut(
                self.pool.new(stage),
                config.branching.unit_groups,
                seed=config.seed,
                domain=Domain.TRAIN,
                stage=stage,
                version=version,
                branches=1,
                fork=fork,
            )
            work += [u for u in of_stage if any((stage, g.index) in absent for g in u.groups)]
        first = min(kept_from(config, units[0].stage), *(u.fork for u in units))
        return Making(work, first)

    def take(self, made: Mapping[Origin, Any]) -> None:
        """Keep refs of prefixes."""
        self._refs |= made

    def of(self, units: Sequence[WorkUnit]) -> dict[int, list[Any]]:
        """By unit index, refs of its groups' prefixes; units that make their own are left out."""
        shared = [u for u in units if all(g.prefix for g in u.groups)]
        return {u.index: [self._refs[g.prefix] for g in u.groups if g.prefix] for u in shared}

    def to_commit(self, stage: int) -> dict[Origin, Prefix]:
        """What was made for a stage and serves again after it, with its arrays."""
        if not needed(self.config, stage, stage + 1):
            return {}
        origins = [origin for origin in self._refs if origin[0] == stage]
        return dict(zip(origins, ray.get([self._refs[o] for o in origins]), strict=True))

    def forget(self, stage: int) -> None:
        """Drop what serves no more in `stage` and later ones."""
        kept = [o for o in self._refs if needed(self.config, o[0], stage)]
        self._refs = {o: self._refs[o] for o in kept}
