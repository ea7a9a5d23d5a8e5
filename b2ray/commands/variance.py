"""`b2ray check --variance`: where in denoising a branch can still change the reward.

For every length of the interval the same prefixes are forked and their branches scored. What the
branches of one prefix differ by can be learnt in that interval; what the prefixes of one prompt
differ by is decided before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b2ray.branching import Group, RewardWindow, cut
from b2ray.config import Config
from b2ray.crew import Crew
from b2ray.diffusion.noise import Domain
from b2ray.errors import ConfigError
from b2ray.tracking.show import Progress

PROMPTS, PREFIXES = 8, 32  # how many prompts, and prefixes of all of them together
MOST = 12  # lengths of the interval that are tried
ENOUGH = 1 / 3  # of the variance: from here on an interval has something to learn


@dataclass(frozen=True)
class Spread:
    """Variances of the reward with forks before the last `interval` steps.

    Attributes:
        within: among the branches of one prefix.
        prefix: among the prefixes of one prompt.
        low: lower end of the 95 % interval of the share, by bootstrap over prompts.
        high: its upper end.
    """

    interval: int
    within: float
    prefix: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """How much of a prompt's variance the branches have."""
        total = self.within + self.prefix
        return self.within / total if total > 0 else 0.0


def measure(config: Config, prompts: Sequence[str], crew: Crew) -> Iterator[Spread]:
    """Fork the same prefixes at every length, without training.

    Args:
        prompts: the training prompts; the first few are used.
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
            units = cut(
                groups,
                config.branching.unit_groups,
                seed=config.seed,
                domain=Domain.TRAIN,
                stage=0,
                version=0,
                branches=branches,
                fork=steps - n,
            )
            doing = f"forking before the last {n} steps"
            with progress.bar(doing, count * branches, "image") as move:
                rollout = crew.rollout(units, move)
            rewards, _ = crew.total_reward(rollout, RewardWindow(0))
            # A row for each prompt: its groups, then their branches.
            table = rewards.reshape(-1, len(chosen), branches).swapaxes(0, 1)
            yield spread(n, table)
    finally:
        progress.close()


def spread(interval: int, rewards: np.ndarray) -> Spread:
    """The variances behind rewards of shape (prompts, prefixes of each, branches of each).

    Analysis of variance with nested groups: the means of prefixes also scatter by the branches that
    they are means of, which is taken off.
    """
    shares = []
    chance = np.random.default_rng(0)
    for _ in range(1000):
        within, prefix = _variances(rewards[chance.integers(len(rewards), size=len(rewards))])
        shares.append(within / (within + prefix) if within + prefix > 0 else 0.0)
    low, high = np.quantile(shares, [0.025, 0.975]).tolist()
    return Spread(interval, *_variances(rewards), low, high)


def _variances(rewards: np.ndarray) -> tuple[float, float]:
    branches = rewards.shape[2]
    within = float(rewards.var(axis=2, ddof=1).mean())
    means = float(rewards.mean(axis=2).var(axis=1, ddof=1).mean())
    return within, max(0.0, means - within / branches)


def advice(found: Sequence[Spread], steps: int) -> str:
    """Where to start the interval."""
    enough = [s.interval for s in found if s.share >= ENOUGH]
    if not enough:
        return (
            f"the branches have less than {ENOUGH:.0%} of the variance at any length: a reward "
            "that the noise of a step hardly changes is better trained with --preset=ddpo"
        )
    n = min(enough)
    return (
        f"start the interval at {n} of {steps} (curriculum.start={n}): the shortest in which the "
        f"branches have {ENOUGH:.0%} of the variance"
    )


def weights(found: Sequence[Spread], steps: int) -> list[float]:
    """`objective.step_weights` for this model and its rewards, two digits, shape (T,).

    What an interval adds to the variance within a prefix is decided by the noise of the steps that
    it adds. Where A is the advantage, the gradient A · d log p of a step has a mean that grows as
    the square root of the step's share, and a scatter that does not: summed with weights in
    proportion to the means, the steps' gradients stand out of their scatter as far as they can.
    """
    lengths = [0, *(s.interval for s in found)]
    # A longer interval has no less; where it was measured so, it was chance.
    within = np.maximum.accumulate([0.0, *(s.within for s in found)])
    each = np.diff(np.interp(np.arange(steps + 1), lengths, within))[::-1]
    if each.max() <= 0:
        return [1.0] * steps
    return [float(f"{w:.2g}") for w in np.sqrt(each / each.max())]


def picture(found: Sequence[Spread], file: Path) -> None:
    """Both spreads and the branches' share over the interval, as a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    n = [s.interval for s in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(n, [s.within**0.5 for s in found], "o-", label="branches of one prefix")
    left.plot(n, [s.prefix**0.5 for s in found], "s--", label="prefixes of one prompt")
    left.set_ylabel("standard deviation of the reward")
    left.legend()
    right.plot(n, [s.share for s in found], "o-")
    right.fill_between(n, [s.low for s in found], [s.high for s in found], alpha=0.2)
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
