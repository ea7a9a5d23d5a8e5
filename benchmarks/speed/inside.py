"""What actors do around the UNet, in processor time, so that it can be told on a busy machine.

A stage of a workload is sampled, scored and learnt in one process with one thread, by the actors'
own code without Ray. What is lost between actors (waiting, messages, commits) is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from b2ray.actors.sampler import Sampler
from b2ray.algorithm.branching import stage_groups, work_units
from b2ray.config import Config
from b2ray.diffusion.clock import Clock
from b2ray.diffusion.trajectory import Selected
from b2ray.objectives.update import Updater
from b2ray.preflight import check_files
from b2ray.rewards import Panel
from benchmarks.speed.floor import loops
from benchmarks.tables import markdown


class ProcessorClock(Clock):
    """A clock of this process's time on a processor."""

    def _now(self) -> Any:
        return time.process_time()


@dataclass
class Spent:
    """Processor seconds of a phase: all of it, and its parts."""

    whole: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rest(self) -> float:
        """What is no part."""
        return self.whole - sum(self.parts.values())


def measure(config: Config) -> dict[str, Spent]:
    """A stage's phases: `sampling`, `learning`; every leaf is trained on."""
    torch.set_num_threads(1)
    prompts = check_files(config)
    sampler = Sampler()
    sampler.load(config, list(prompts.trained()))
    policy = sampler.policy
    sampler.bind(0, policy.lora_state())
    panel = Panel(config.rewards, policy.device)
    sampling, learning = Spent(), Spent()
    units = work_units(
        config, stage_groups(config, prompts.train, 0), 0, 0, config.interval_bounds[0]
    )
    trees = config.evaluation.trees if config.branching.branches > 1 else 0
    selected: list[Selected] = []
    policy.decode = _timed(policy.decode, sampling, "decoding")
    panel.score = _timed(panel.score, sampling, "scoring")
    clock = policy.clock = ProcessorClock(policy.device)
    with _all_of(sampling):
        for unit in units:
            _, prefix = sampler.denoise_prefix(unit)
            for low, high in unit.ranges(config.branching.branch_batch):
                shown = max(0, trees - unit.index * config.branching.unit_groups)
                _, pictures, *found = sampler.denoise_branches(
                    unit, prefix, low, high, True, True, shown
                )
                texts = [unit.groups[g].prompt for g, _ in unit.leaves(low, high)]
                panel.score(pictures, texts, [r.name for r in config.rewards])
                n = config.interval_bounds[0]
                selected += [
                    Selected(text, 1.0 - 2.0 * (j % 2), n, lambda t=leaf: t)
                    for j, (text, leaf) in enumerate(zip(texts, found, strict=True))
                ]
    sampling.parts["UNet"] = clock.seconds
    updater = Updater(policy, config)
    clock = policy.clock = ProcessorClock(policy.device)
    with _all_of(learning):
        updater.update(0, selected)
    learning.parts["UNet"] = clock.seconds
    return {"sampling": sampling, "learning": learning}


def by_batch(config: Config, sizes: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Processor milliseconds of a guided evaluation: forward, and forward and back."""
    calls, found = loops(config), {}
    for size in sizes:
        each = []
        for kind in ("sampling", "learning"):
            calls[kind](size)
            times = []
            for _ in range(3):
                began = time.process_time()
                calls[kind](size)
                times.append(time.process_time() - began)
            each.append(1000 * float(np.median(times)) / size)
        found[size] = (each[0], each[1])
    return found


def table(found: Mapping[str, Mapping[str, Spent]]) -> str:
    """Seconds of each workload's phases and their parts, and each phase over its UNet."""
    rows = []
    for name, phases in found.items():
        for phase, spent in phases.items():
            cells = [f"{spent.parts.get(p, 0.0):.2f}" for p in ("UNet", "decoding", "scoring")]
            over = f"{spent.rest / spent.parts['UNet']:.1%}"
            rows.append([name, phase, *cells, f"{spent.rest:.2f}", over])
    heads = ["workload", "phase", "UNet", "decoding", "scoring", "the rest", "rest / UNet"]
    return markdown(heads, rows)


def batches(found: Mapping[int, tuple[float, float]]) -> str:
    """Milliseconds of an evaluation by batch size."""
    rows = [[str(size), *(f"{value:.2f}" for value in both)] for size, both in found.items()]
    return markdown(["latents a call", "forward, ms each", "forward and back, ms each"], rows)


@contextmanager
def _all_of(spent: Spent) -> Iterator[None]:
    began = time.process_time()
    yield
    spent.whole = time.process_time() - began


def _timed(call: Callable[..., Any], spent: Spent, part: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        found = call(*args, **kwargs)
        spent.parts[part] = spent.parts.get(part, 0.0) + time.process_time() - began
        return found

    return timed
