"""Prefixes that serve in several stages: whose a group has, which a stage makes, and their file.

Needs neither torch nor Ray.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.numpy

from b2ray.branching import Group, draw_groups
from b2ray.config import Config
from b2ray.curriculum import longest
from b2ray.diffusion.trajectory import Prefix
from b2ray.prompts import PromptSet

Origin = tuple[int, int]  # the stage and the group for which a prefix is sampled


class Pool:
    """The groups of every stage of a run, and whose prefixes they have.

    With `prefix.policy=reuse` a stage has the groups of the last one that drew some. With `base` it
    draws its own, and the j-th group of a prompt has that prompt's j-th prefix, which the first
    stage that needs it makes. With `current` no prefix serves twice, and none has a name.

    Args:
        config: the run's configuration.
        prompts: that it trains on.
    """

    def __init__(self, config: Config, prompts: PromptSet) -> None:
        self._config, self._prompts = config, prompts
        self._first: dict[tuple[object, int], Origin] = {}  # by name
        self._walked = 0  # stages whose names are all known

    def groups(self, stage: int) -> list[Group]:
        """The groups of a stage."""
        if self._config.prefix.policy == "current":
            return self._drawn(stage)
        for earlier in range(self._walked, stage + 1):
            for name, group in self._named(earlier):
                self._first.setdefault(name, (earlier, group.index))
        self._walked = max(self._walked, stage + 1)
        return [replace(group, prefix=self._first[name]) for name, group in self._named(stage)]

    def new(self, stage: int) -> list[Group]:
        """Those of a stage's groups whose prefixes no earlier stage has made."""
        return [g for g in self.groups(stage) if g.prefix in (None, (stage, g.index))]

    def _drawn(self, stage: int) -> list[Group]:
        config, prompts = self._config, self._prompts
        return draw_groups(config.seed, stage, prompts.texts, config.groups, prompts.weights)

    def _named(self, stage: int) -> Iterator[tuple[tuple[object, int], Group]]:
        prefix = self._config.prefix
        origin = prefix.drawn(stage)
        seen: Counter[str] = Counter()
        for group in self._drawn(origin):
            if prefix.policy == "reuse":
                yield (origin, group.index), group
            else:
                yield (group.prompt, seen[group.prompt]), group
                seen[group.prompt] += 1


def kept_from(config: Config, made: int) -> int:
    """The earliest step at which a prefix that a stage makes may have to be forked.

    The interval only grows, so that the fork only moves to earlier latents of the same prefix.
    """
    last = config.curriculum.stages - 1
    if config.prefix.stages:
        last = min(last, made + config.prefix.stages)
    return config.sampling.steps - longest(config, last)


def needed(config: Config, made: int, stage: int) -> bool:
    """Whether prefixes that stage `made` has made may serve in stage `stage` or later ones."""
    if config.prefix.policy == "current" or stage >= config.curriculum.stages:
        return False
    return config.prefix.stages is None or stage <= made + config.prefix.stages


def packed(made: Mapping[Origin, Prefix]) -> bytes:
    """Prefixes of one stage as a safetensors file. The same give the same bytes."""
    (stage,), (first,) = {s for s, _ in made}, {p.first for p in made.values()}
    tensors = {f"{group:05d}": prefix.latents for (_, group), prefix in sorted(made.items())}
    # One entry only: safetensors writes several in random order.
    notes = json.dumps({"stage": stage, "first": first})
    return safetensors.numpy.save(tensors, metadata={"prefixes": notes})


def unpacked(files: Sequence[Path]) -> dict[Origin, Prefix]:
    """What `packed` made of several stages."""
    found = {}
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as stored:
            notes = json.loads(stored.metadata()["prefixes"])
            for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                found[notes["stage"], int(name)] = Prefix(stored.get_tensor(name), notes["first"])
    return found
