"""`b2ray check --variance`: measures in which denoising steps the reward is decided.

For every length of the interval the same prefixes are forked, and their branches are scored. The
variance among the branches of one prefix can be learnt in that interval; the variance among the
prefixes of one prompt is decided before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b2ray.algorithm.branching import Group, RewardWindow, WorkUnit, cut
from b2ray.config import Config
from b2ray.diffusion.noise import Domain
from b2ray.errors import ConfigError
from b2ray.rollout.stage import StageRunner
from b2ray.tracking.show import Progress

PROMPTS, PREFIXES = 8, 32  # the number of prompts, and of prefixes of all prompts together
MOST = 12  # the most lengths of the interval that are tried
ENOUGH = 1 / 3  # the share of the variance from which on an interval has something to learn


@dataclass(frozen=True)
class Spread:
    """The variances of the reward if prefixes are forked before the last `interval` steps.

    Attributes:
        interval: n, the number of denoising steps after the fork.
        within: the variance among the branches of one prefix.
        prefix: the variance among the prefixes of one prompt.
        low: the lower end of the 95 % interval of `share`, by bootstrap over prompts.
        high: the upper end of that interval.
    """

    interval: int
    within: float
    prefix: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """The branches' share of the variance of one prompt's rewards, 0 … 1."""
        total = self.within + self.prefix
        return self.within / total if total > 0 else 0.0


def measure(config: Config, prompts: Sequence[str], runner: StageRunner) -> Iterator[Spread]:
    """Fork the same prefixes at every length of the interval, without training.

    Args:
        config: the run's configuration.
        prompts: the training prompts, of which the first few are used.
        runner: samples and scores the branches.

    Yields:
        The variances for each length, beginning with the shortest.
    """
    branches = max(2, config.branching.branches)
    chosen = list(prompts[:PROMPTS])
    count = PREFIXES // len(chosen) * len(chosen)
    groups = [Group(i, chosen[i % len(chosen)]) for i in range(count)]
    steps = config.sampling.steps
    lengths = np.unique(np.linspace(1, steps, min(steps, MOST)).round().astype(int)).tolist()
    progress = Progress(0, 0)
    try:
        for n in lengths:
            unit = WorkUnit(
                seed=config.seed,
                domain=Domain.TRAIN,
                stage=0,
                version=0,
                branches=branches,
                fork=steps - n,
            )
            units = cut(groups, config.branching.unit_groups, unit)
            doing = f"forking before the last {n} steps"
            with progress.bar(doing, count * branches, "image") as move:
                rollout = runner.roll_out(units, move)
            rewards = runner.rewards(rollout, RewardWindow(0)).total
            # Groups cycle through the prompts; make the shape (prompts, prefixes, branches).
            table = rewards.reshape(-1, len(chosen), branches).swapaxes(0, 1)
            yield spread(n, table)
    finally:
        progress.close()


def spread(interval: int, rewards: np.ndarray) -> Spread:
    """Estimate the variances by a nested analysis of variance.

    The means of prefixes also vary because they are means of a few branches only; that part is
    subtracted.

    Args:
        interval: n, the number of denoising steps after the fork.
        rewards: shape (prompts, prefixes of each prompt, branches of each prefix).
    """
    shares = []
    rng = np.random.default_rng(0)
    for _ in range(1000):
        within, prefix = _variances(rewards[rng.integers(len(rewards), size=len(rewards))])
        shares.append(within / (within + prefix) if within + prefix > 0 else 0.0)
    low, high = np.quantile(shares, [0.025, 0.975]).tolist()
    return Spread(interval, *_variances(rewards), low, high)


def _variances(rewards: np.ndarray) -> tuple[float, float]:
    """Return the variance among branches of a prefix, and among prefixes of a prompt."""
    branches = rewards.shape[2]
    within = float(rewards.var(axis=2, ddof=1).mean())
    means = float(rewards.mean(axis=2).var(axis=1, ddof=1).mean())
    return within, max(0.0, means - within / branches)


def advice(spreads: Sequence[Spread], steps: int) -> str:
    """Return a sentence on where to start the interval.

    Args:
        spreads: what `measure` found.
        steps: T, the number of denoising steps.
    """
    learnable = [s.interval for s in spreads if s.share >= ENOUGH]
    if not learnable:
        return (
            f"the branches have less than {ENOUGH:.0%} of the variance at any length: a reward "
            "that the noise of a step hardly changes is better trained with --preset=ddpo"
        )
    n = min(learnable)
    return (
        f"start the interval at {n} of {steps} (curriculum.start={n}): the shortest in which the "
        f"branches have {ENOUGH:.0%} of the variance"
    )


def weights(spreads: Sequence[Spread], steps: int) -> list[float]:
    """Return `objective.step_weights` for this model and its rewards.

    A longer interval has more variance within a prefix, and the noise of the steps that it adds is
    the cause. With the advantage A, the gradient A · d log p of a step has a mean that grows as the
    square root of the step's share of that variance, and a standard deviation that does not. So the
    sum of the gradients has the best signal-to-noise ratio if the weights are proportional to the
    means.

    Args:
        spreads: what `measure` found.
        steps: T, the number of denoising steps.

    Returns:
        T weights with two digits in the order of denoising, the largest of them 1.
    """
    lengths = [0, *(s.interval for s in spreads)]
    # The variance cannot fall with the length; where it was measured to, that was chance.
    within = np.maximum.accumulate([0.0, *(s.within for s in spreads)])
    added = np.diff(np.interp(np.arange(steps + 1), lengths, within))[::-1]
    if added.max() <= 0:
        return [1.0] * steps
    return [float(f"{w:.2g}") for w in np.sqrt(added / added.max())]


def picture(spreads: Sequence[Spread], file: Path) -> None:
    """Plot the standard deviations and the branches' share over the interval.

    Args:
        spreads: what `measure` found.
        file: the PNG file.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    n = [s.interval for s in spreads]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(n, [s.within**0.5 for s in spreads], "o-", label="branches of one prefix")
    left.plot(n, [s.prefix**0.5 for s in spreads], "s--", label="prefixes of one prompt")
    left.set_ylabel("standard deviation of the reward")
    left.legend()
    right.plot(n, [s.share for s in spreads], "o-")
    right.fill_between(n, [s.low for s in spreads], [s.high for s in spreads], alpha=0.2)
    right.axhline(ENOUGH, color="grey", linewidth=1)
    right.set_ylabel("the branches' share of the variance")
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.set_xlabel("interval n (the last n steps are branched and trained)")
        axis.grid(alpha=0.3)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    finally:
        plt.close(figure)
