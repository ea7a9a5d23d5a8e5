"""Branch-based sampling: groups of branches, their advantages, and which of them are trained on.

This module is pure numpy and knows neither Ray nor a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from b2ray.algorithm.systematic import systematic
from b2ray.config import Advantage, Config, Selection
from b2ray.diffusion.noise import Domain, generator
from b2ray.prompts import PromptSet

# Rewards with a standard deviation below this differ only by rounding: their advantage is 0.
MIN_STD = 1e-8


@dataclass(frozen=True)
class Group:
    """The branches that share a prompt, the initial noise x_T and the prefix.

    Attributes:
        index: its number within the stage, which keys its noise.
        prompt: the prompt.
        picture: file of a demonstration; empty if the policy samples the group.
    """

    index: int
    prompt: str
    picture: str = ""


@dataclass(frozen=True)
class WorkUnit:
    """A fixed list of groups that is dispatched as a whole, and again after a loss.

    Its results are a pure function of the policy's weights and of these attributes.

    Attributes:
        seed: the run's seed.
        domain: what the groups are for, which keys their noise.
        stage: the stage that the groups are sampled for, which keys their noise, too.
        version: version of the policy that samples.
        branches: K, the branches of each group.
        fork: number of the step at which the branches fork.
        index: its number among the units of the stage.
        groups: the groups.
    """

    seed: int
    domain: Domain
    stage: int
    version: int
    branches: int
    fork: int
    index: int = 0
    groups: tuple[Group, ...] = ()

    def leaves(self, low: int, high: int) -> list[tuple[int, int]]:
        """The leaves low .. high - 1 as pairs (position of the group in this unit, branch)."""
        return [divmod(leaf, self.branches) for leaf in range(low, high)]

    def ranges(self, batch: int) -> Iterator[tuple[int, int]]:
        """Divide the unit's leaves into ranges (low, high) of at most `batch` leaves."""
        total = len(self.groups) * self.branches
        for low in range(0, total, batch):
            yield low, min(low + batch, total)


@dataclass(frozen=True)
class SelectedLeaf:
    """A leaf that a stage trains on.

    Attributes:
        prompt: the prompt of its group.
        advantage: how much better than expected its picture is.
        group: number of its group, counted over all units of the stage.
        branch: number of its branch in the group.
    """

    prompt: str
    advantage: float
    group: int
    branch: int


def draw_groups(
    seed: int, stage: int, prompts: Sequence[str], count: int, weights: Sequence[float] = ()
) -> list[Group]:
    """Draw the prompts of a stage's groups.

    With equal weights, or none, every prompt is drawn before any is drawn again. With unequal
    weights a prompt gets count · weight / sum of weights groups on average over the stages, and in
    each stage differs from that by less than one group.

    Args:
        seed: the run's seed.
        stage: number of the stage.
        prompts: the training prompts.
        count: how many groups to draw.
        weights: a relative frequency for each prompt.
    """
    unequal = weights and min(weights) < max(weights)
    order = (
        _by_weight(seed, stage, np.asarray(weights, np.float64), count)
        if unequal
        else _in_rounds(seed, stage, len(prompts), count)
    )
    return [Group(index, prompts[p]) for index, p in enumerate(order)]


def _in_rounds(seed: int, stage: int, prompts: int, count: int) -> list[int]:
    """Draw `count` prompt numbers below `prompts`, in rounds over all of them."""
    order: list[int] = []
    rounds = 0
    while len(order) < count:
        draw = generator(seed, Domain.PROMPTS, stage, rounds)
        order.extend(draw.permutation(prompts).tolist())
        rounds += 1
    return order[:count]


def _by_weight(seed: int, stage: int, weights: np.ndarray, count: int) -> list[int]:
    """Draw `count` prompt numbers by systematic sampling with unequal weights.

    The prompts lie on the line in a random order, so that no two of them are always drawn together,
    and the numbers are shuffled.
    """
    draw = generator(seed, Domain.PROMPTS, stage)
    line = draw.permutation(len(weights))
    positions = systematic(weights[line] / weights.max(), count, draw)
    return draw.permutation(line[positions]).tolist()


def stage_groups(config: Config, prompts: PromptSet, stage: int) -> list[Group]:
    """The groups that a stage draws from the training prompts."""
    return draw_groups(config.seed, stage, prompts.texts, config.groups, prompts.weights)


def work_units(
    config: Config, groups: Sequence[Group], stage: int, version: int, n: int
) -> list[WorkUnit]:
    """Divide a stage's groups into work units of a fixed size, forked before the last n steps.

    Args:
        config: the run's configuration.
        groups: the groups.
        stage: number of the stage.
        version: version of the policy that samples.
        n: the interval, in steps.
    """
    return cut(
        groups,
        config.branching.unit_groups,
        WorkUnit(
            seed=config.seed,
            domain=Domain.TRAIN,
            stage=stage,
            version=version,
            branches=config.branching.branches,
            fork=config.sampling.steps - n,
        ),
    )


def cut(groups: Sequence[Group], size: int, unit: WorkUnit) -> list[WorkUnit]:
    """Divide groups into work units of at most `size` groups.

    Args:
        groups: the groups of all units, in order.
        size: the most groups in a unit.
        unit: the first unit, still without groups; the next ones differ in index and groups only.
    """
    parts = [tuple(groups[low : low + size]) for low in range(0, len(groups), size)]
    return [replace(unit, index=index, groups=part) for index, part in enumerate(parts, unit.index)]


@dataclass
class RewardWindow:
    """Rewards of each prompt over its last stages.

    Attributes:
        stages: how many earlier stages are kept beside the latest (in the released code, eight).
        rewards: for each prompt a list of its stages' rewards, the earliest stage first.
    """

    stages: int
    rewards: dict[str, list[list[float]]] = field(default_factory=dict)

    def with_stage(self, prompts: Sequence[str], rewards: np.ndarray) -> RewardWindow:
        """A window that also holds this stage's rewards.

        Args:
            prompts: the prompt of each of G groups.
            rewards: float, shape (G, K).
        """
        latest: dict[str, list[float]] = {}
        for prompt, row in zip(prompts, rewards, strict=True):
            latest.setdefault(prompt, []).extend(float(r) for r in row)
        window = {p: list(stages) for p, stages in self.rewards.items()}
        for prompt, values in latest.items():
            window[prompt] = [*window.get(prompt, []), values][-(self.stages + 1) :]
        return RewardWindow(self.stages, window)

    def statistics(self, min_count: int) -> Mapping[str, tuple[float, float]]:
        """The mean and the standard deviation of each prompt's rewards.

        Args:
            min_count: a prompt with fewer rewards has the statistics of all prompts together.
        """
        flat = {p: np.concatenate([np.asarray(r) for r in rs]) for p, rs in self.rewards.items()}
        pooled = np.concatenate(list(flat.values())) if flat else np.zeros(0)
        used = {p: (v if len(v) >= min_count else pooled) for p, v in flat.items()}
        return {
            p: (float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0)
            for p, v in used.items()
        }

    def variance(self, branches: int) -> float | None:
        """The total variance of a prompt's rewards, averaged over prompts.

        It does not depend on where groups fork. By the analysis of variance it is the variance
        within groups plus that between them, where the latter is the variance of the groups' means
        without the part that is due to the variance within groups.

        Args:
            branches: K, the same in all stages.

        Returns:
            The variance; None if no prompt has two groups in the window.
        """
        # A row for each prompt: variance within groups, variance of their means, degrees of freedom
        rows = []
        for stages in self.rewards.values():
            groups = np.concatenate([np.asarray(r) for r in stages]).reshape(-1, branches)
            if len(groups) > 1:
                within = groups.var(axis=1, ddof=1).mean() if branches > 1 else 0.0
                rows.append((within, groups.mean(axis=1).var(ddof=1), len(groups) - 1))
        if not rows:
            return None
        table = np.array(rows)
        within, means = np.average(table[:, :2], axis=0, weights=table[:, 2])
        return float(within + max(0.0, means - within / branches))


def advantages(
    rewards: np.ndarray, prompts: Sequence[str], window: RewardWindow, config: Advantage
) -> np.ndarray:
    """The advantage of every leaf, float32, shape (G, K).

    Centred on the `group` it is (r - mean of the group) / std of the prompt's window, which does
    not depend on how good the prefix is. Centred on the `prompt` it is the z-score of r in the
    prompt's window, as in the released code and in DDPO. Scaled by the `group`, the standard
    deviation is that of the group (GRPO, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: float, shape (G, K).
        prompts: the prompt of each group.
        window: the rewards of the last stages, this stage's included.
        config: centre, scale, minimum count and clamp.
    """
    statistics = window.statistics(config.min_count)
    mean, std = np.array([statistics[p] for p in prompts]).T[:, :, None]
    if config.scale == "group":
        std = rewards.std(axis=1, keepdims=True)
    centre = rewards.mean(axis=1, keepdims=True) if config.center == "group" else mean
    scaled = np.divide(
        rewards - centre, std, out=np.zeros_like(rewards, dtype=np.float64), where=std > MIN_STD
    )
    return scaled.clip(-config.clamp, config.clamp).astype(np.float32)


def select(rewards: np.ndarray, advantage: np.ndarray, config: Selection) -> np.ndarray:
    """Select the leaves that are trained on.

    Groups whose rewards are equal (within `min_gap`) are skipped: their best and worst leaf would
    be the same one, with two opposite advantages.

    Args:
        rewards: float, shape (G, K).
        advantage: float, shape (G, K).
        config: which leaves of a group, and the thresholds.

    Returns:
        bool, shape (G, K).
    """
    # Skip the groups without signal.
    g, k = rewards.shape
    gap = rewards.max(axis=1) - rewards.min(axis=1)
    has_signal = (gap > config.min_gap) if k > 1 else np.ones(g, bool)
    if config.kind == "all":
        return np.repeat(has_signal[:, None], k, axis=1)

    # Of the others keep the best and the worst leaf, if the thresholds let them pass.
    rows = np.arange(g)
    best, worst = rewards.argmax(axis=1), rewards.argmin(axis=1)
    keep_best = has_signal & (
        np.full(g, True)
        if config.best_above is None
        else advantage[rows, best] >= config.best_above
    )
    keep_worst = has_signal & (
        np.full(g, True)
        if config.worst_below is None
        else advantage[rows, worst] < config.worst_below
    )
    if config.require_pair:
        keep_best = keep_worst = keep_best & keep_worst
    selected = np.zeros((g, k), bool)
    selected[rows[keep_best], best[keep_best]] = True
    selected[rows[keep_worst], worst[keep_worst]] = True
    return selected


def spread(rewards: np.ndarray, chosen: np.ndarray, window: RewardWindow) -> dict[str, float]:
    """Metrics of how much the branches of a group differ, and how much the groups do.

    `branch/within_share` is the branches' share of the variance of a prompt's rewards. That
    variance is of the whole window, as a stage may have only one group of each prompt; as long as
    the window, too, has only one, this metric is left out.

    Args:
        rewards: float, shape (G, K).
        chosen: which leaves are trained on, bool, shape (G, K).
        window: the rewards of the last stages, this stage's included.
    """
    k = rewards.shape[1]
    within = float(rewards.var(axis=1, ddof=1).mean()) if k > 1 else 0.0
    total = window.variance(k)
    share = {}
    if total is not None:
        # The branches of this stage may vary more than those of the window.
        share["branch/within_share"] = within / max(total, within) if within else 0.0
    return {
        **share,
        "branch/within_std": float(rewards.std(axis=1).mean()) if k > 1 else 0.0,
        "branch/between_std": float(rewards.mean(axis=1).std()),
        "branch/pair_rate": float((chosen.sum(axis=1) >= min(2, k)).mean()),
        "branch/selected": float(chosen.mean()),
    }
