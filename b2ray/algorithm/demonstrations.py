"""The demonstrations of a stage, as work units beside those that the policy samples itself."""

from __future__ import annotations

from collections.abc import Sequence

from b2ray.algorithm.branching import Group, WorkUnit, cut
from b2ray.config import Config
from b2ray.diffusion.noise import Domain, generator
from b2ray.prompts.demonstrations import Demonstration


def draw(seed: int, stage: int, available: int, count: int) -> list[int]:
    """Draw the numbers of the demonstrations that a stage uses.

    Every demonstration is drawn before any is drawn again. The run goes through them in rounds,
    each in another random order, and a stage uses the next `count` of them.

    Args:
        seed: the run's seed.
        stage: number of the stage.
        available: how many demonstrations there are.
        count: how many of them a stage uses.
    """
    numbers: list[int] = []
    for draws in range(stage * count, (stage + 1) * count):
        rounds, position = divmod(draws, available)
        if not numbers or position == 0:
            order = generator(seed, Domain.DEMONSTRATE, rounds).permutation(available)
        numbers.append(int(order[position]))
    return numbers


def demonstration_units(
    config: Config,
    demonstrations: Sequence[Demonstration],
    stage: int,
    version: int,
    n: int,
    first: int,
) -> list[WorkUnit]:
    """The demonstrations of a stage in work units, one for each group that the policy samples.

    Args:
        config: the run's configuration.
        demonstrations: all that there are.
        stage: number of the stage.
        version: version of the policy that computes their densities.
        n: the interval, in steps.
        first: index of the first of these units.
    """
    numbers = draw(config.seed, stage, len(demonstrations), config.groups)
    groups = [
        Group(i, demonstrations[j].caption, str(demonstrations[j].file))
        for i, j in enumerate(numbers)
    ]
    return cut(
        groups,
        config.branching.unit_groups,
        WorkUnit(
            seed=config.seed,
            domain=Domain.DEMONSTRATE,
            stage=stage,
            version=version,
            branches=1,
            fork=config.sampling.steps - n,
            index=first,
        ),
    )
