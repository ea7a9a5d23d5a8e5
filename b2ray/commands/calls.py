"""`b2ray check --calls`: how large the UNet's calls should be on this hardware.

Sizes of calls are part of a configuration and not chosen anew by each run, because another size may
round differently: a run would not end with the same bytes on another machine. So they are measured
once, by the run's own actors, and written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from b2ray.config import Config
from b2ray.crew import Crew
from b2ray.tracking.show import Progress

NEAR = 1.03  # of the least time a latent: not worth a larger call, which takes more memory
PATIENCE = 30.0  # seconds of a call after which no larger one is tried


@dataclass(frozen=True)
class Size:
    """Calls of one size: seconds of one; None if there is no memory for it."""

    rows: int
    seconds: float | None

    @property
    def each(self) -> float:
        """Milliseconds a latent."""
        return float("inf") if self.seconds is None else 1000 * self.seconds / self.rows


@dataclass(frozen=True)
class Sizes:
    """What was measured for a field of the configuration."""

    field: str
    given: int
    tried: list[Size]

    @property
    def fit(self) -> int | None:
        """The smallest size that is about as fast as any; None if none has room."""
        least = min(size.each for size in self.tried)
        near = (s.rows for s in self.tried if s.seconds and s.each <= NEAR * least)
        return next(near, None)

    def __str__(self) -> str:
        each = ((s.rows, f"{s.each:.3g}" if s.seconds else "no room") for s in self.tried)
        return ", ".join(f"{rows}: {told}" for rows, told in each)


def measure(config: Config, crew: Crew) -> Iterator[Sizes]:
    """Double the size of a sampler's and the learner's calls as far as a stage has rows for it."""
    learner, leaves = config.learner, config.groups * config.branching.branches
    batch = leaves if learner.batch == "all" else min(learner.batch, leaves)
    share = -(-batch // learner.ranks) * learner.drawn_steps(config.interval_bounds[1])
    fields = (
        ("branching.branch_batch", config.branching.branch_batch, "sampler", leaves),
        ("learner.microbatch", learner.microbatch, "learner", share),
    )
    for field, given, role, most in fields:
        yield Sizes(field, given, _tried(crew, role, most))


def _tried(crew: Crew, role: str, most: int) -> list[Size]:
    found: list[Size] = []
    sizes = [2**j for j in range(most.bit_length())]
    progress = Progress(0, 0)
    try:
        with progress.bar(f"timing calls of the {role}", len(sizes), "size") as move:
            for rows in sizes:
                found.append(Size(rows, crew.time_call(role, rows)))
                move(1)
                seconds = found[-1].seconds
                if seconds is None or seconds > PATIENCE:
                    break
    finally:
        progress.close()
    return found
