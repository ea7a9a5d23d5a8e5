"""Backward progressive training: how many of the last denoising steps a stage trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from b2ray.config import Config


def interval(stage: int, stages: int, start: int, end: int, growth: float = 1.0) -> int:
    """n, the number of last denoising steps that `stage` trains.

    n(i) = start + floor((end - start + 1) · (i / stages)^growth), never above `end`. Linear growth
    from 14 to 20 over 100 stages is the released schedule: 15, 14, 14, 15, 14, 14 and 14 stages.

    Args:
        stage: i, from 0 to stages - 1.
        stages: number of stages of the run.
        start: the first interval, in steps.
        end: the last interval, in steps, at least `start`.
        growth: exponent; above 1 the interval stays short for longer.

    Raises:
        ValueError: the stage is outside the run.
    """
    if not 0 <= stage < stages:
        raise ValueError(f"stage {stage} is outside 0..{stages - 1}")
    levels = end - start + 1
    # Integers where they suffice: 7 · 43 / 100 in floats could fall on the wrong side of a step.
    growth_steps = (
        levels * stage // stages
        if growth == 1
        else math.floor(levels * math.pow(stage / stages, growth))
    )
    return min(start + growth_steps, end)


def adapted(
    measured: Sequence[tuple[int, float]], start: int, end: int, min_share: float, patience: int
) -> int:
    """n of the next stage, with an interval that grows as the rewards' variance asks for it.

    It grows by a step when the branches' share of the variance, averaged over the last `patience`
    stages, has fallen below `min_share`, if all these stages had the same n.

    Args:
        measured: n and the branches' share, for every stage so far in which it was measured.
        start: the first interval, in steps.
        end: the last interval, in steps.
        min_share: share below which the interval grows.
        patience: how many stages the share is averaged over.
    """
    if not measured:
        return start
    n = measured[-1][0]
    recent = [share for length, share in measured[-patience:] if length == n]
    grows = len(recent) == patience and sum(recent) / patience < min_share
    return min(n + grows, end)


def longest(config: Config, stage: int) -> int:
    """The largest n that a stage can have, which never falls from stage to stage.

    With `curriculum.extend=calendar` it is n itself. With `spread` the interval grows at most once
    in `patience` stages.
    """
    curriculum, (start, end) = config.curriculum, config.interval_bounds
    if curriculum.extend == "spread":
        return min(end, start + stage // curriculum.patience)
    return interval(stage, curriculum.stages, start, end, curriculum.growth)
