"""`b2ray check --calls`: measures how large the UNet's batches should be on this hardware.

The batch sizes are part of the configuration, and a run does not choose them itself: another size
may round differently, and the run would end with other weights on another machine. So this command
measures them once, with the run's own actors, and the user writes them into the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from b2ray.config import Config
from b2ray.rollout.workers import Workers
from b2ray.tracking.show import Progress

# A batch with at most this multiple of the least time per latent is as good as the fastest one.
NEAR = 1.03
PATIENCE = 30.0  # seconds of a call beyond which no larger batch is tried


@dataclass(frozen=True)
class Size:
    """The measurement of one batch size.

    Attributes:
        rows: the number of latents in a call.
        seconds: how long a call took; None if there is not enough memory for it.
    """

    rows: int
    seconds: float | None

    @property
    def each(self) -> float:
        """The milliseconds per latent; infinite if there is not enough memory."""
        return float("inf") if self.seconds is None else 1000 * self.seconds / self.rows


@dataclass(frozen=True)
class Sizes:
    """The measurements for one field of the configuration.

    Attributes:
        field: the dotted name of the field.
        given: the value that the configuration has.
        tried: the measurements, beginning with the smallest batch.
    """

    field: str
    given: int
    tried: list[Size]

    @property
    def fit(self) -> int | None:
        """The smallest batch that is about as fast per latent as any; None if none fits."""
        least = min(size.each for size in self.tried)
        near = (s.rows for s in self.tried if s.seconds and s.each <= NEAR * least)
        return next(near, None)

    def __str__(self) -> str:
        times = ((s.rows, f"{s.each:.3g}" if s.seconds else "no room") for s in self.tried)
        return ", ".join(f"{rows}: {time}" for rows, time in times)


def measure(config: Config, workers: Workers) -> Iterator[Sizes]:
    """Time a sampler's and the learner's calls in batches of 1, 2, 4, … latents.

    The largest batch is the largest power of two that a stage can fill.

    Args:
        config: the run's configuration.
        workers: the run's workers, whose models are loaded.
    """
    learner, leaves = config.learner, config.groups * config.branching.branches
    batch = leaves if learner.batch == "all" else min(learner.batch, leaves)
    share = -(-batch // learner.ranks) * learner.drawn_steps(config.interval_bounds[1])
    fields = (
        ("branching.branch_batch", config.branching.branch_batch, "sampler", leaves),
        ("learner.microbatch", learner.microbatch, "learner", share),
    )
    for field, value, role, most in fields:
        yield Sizes(field, value, _timed(workers, role, most))


def _timed(workers: Workers, role: str, most: int) -> list[Size]:
    """Time larger and larger batches, until one takes too long or does not fit."""
    measured: list[Size] = []
    sizes = [2**j for j in range(most.bit_length())]
    progress = Progress(0, 0)
    try:
        with progress.bar(f"timing calls of the {role}", len(sizes), "size") as move:
            for rows in sizes:
                seconds = workers.time_call(role, rows)
                measured.append(Size(rows, seconds))
                move(1)
                if seconds is None or seconds > PATIENCE:
                    break
    finally:
        progress.close()
    return measured
