"""Branch-based sampling: groups, what of them is trained on, and with which advantage.

Pure numpy; nothing here knows of Ray or of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from b2ray.config import Advantage, Config, Selection
from b2ray.diffusion.noise import Domain, generator

# A spread below this is rounding, not signal: such rewards give no advantage.
MIN_STD = 1e-8


@dataclass(frozen=True)
class Group:
    """One prompt, one x_T, one prefix; `index` keys its noise within the stage.

    Attributes:
        picture: file of a demonstration; empty where the policy draws.
        prefix: (stage, group) for which its prefix is sampled, if that serves in several stages;
            None: the prefix is its own.
    """

    index: int
    prompt: str
    picture: str = ""
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True)
class WorkUnit:
    """A fixed list of groups: what is dispatched, done again after a loss, and replayed.

    Its results are a pure function of the weights and of what stands here.
    """

    seed: int
    domain: Domain
    stage: int
    version: int
    index: int
    groups: tuple[Group, ...]
    branches: int
    fork: int

    def leaves(self, low: int, high: int) -> list[tuple[int, int]]:
        """(position of the group in this unit, branch) of the leaves low .. high - 1."""
        return [divmod(leaf, self.branches) for leaf in range(low, high)]

    def ranges(self, batch: int) -> Iterator[tuple[int, int]]:
        """The unit's leaves cut into calls of at most `batch`."""
        total = len(self.groups) * self.branches
        for low in range(0, total, batch):
            yield low, min(low + batch, total)


def draw_groups(
    seed: int, stage: int, prompts: Sequence[str], count: int, weights: Sequence[float] = ()
) -> list[Group]:
    """The groups of a stage.

    With equal weights (or none) every prompt is drawn before one is drawn again. With others a
    prompt's number of groups is within one of its share, count · weight / sum of weights, and is
    the share on average over the stages.
    """
    unequal = weights and min(weights) < max(weights)
    order = (
        _systematic(seed, stage, np.asarray(weights, np.float64), count)
        if unequal
        else _in_rounds(seed, stage, len(prompts), count)
    )
    return [Group(index, prompts[p]) for index, p in enumerate(order)]


def _in_rounds(seed: int, stage: int, prompts: int, count: int) -> list[int]:
    order: list[int] = []
    rounds = 0
    while len(order) < count:
        draw = generator(seed, Domain.PROMPTS, stage, rounds)
        order.extend(draw.permutation(prompts).tolist())
        rounds += 1
    return order[:count]


def _systematic(seed: int, stage: int, weights: np.ndarray, count: int) -> list[int]:
    """Points at equal distances, all shifted by one random number, on the line of the shares.

    Systematic sampling (Madow 1949). The prompts lie on the line in a random order, so that no two
    of them are always drawn together, and the draw is shuffled.
    """
    draw = generator(seed, Domain.PROMPTS, stage)
    line = draw.permutation(len(weights))
    ends = (weights[line] / weights.max()).cumsum()
    ends *= count / ends[-1]
    points = draw.random() + np.arange(count)
    # Rounding may put the last point on the line's end.
    chosen = np.searchsorted(ends, points, side="right").clip(max=len(weights) - 1)
    return draw.permutation(line[chosen]).tolist()


def work_units(
    config: Config, groups: Sequence[Group], stage: int, version: int, n: int
) -> list[WorkUnit]:
    """A stage's groups, cut into units of a fixed size, forked before the last n steps."""
    return cut(
        groups,
        config.branching.unit_groups,
        seed=config.seed,
        domain=Domain.TRAIN,
        stage=stage,
        version=version,
        branches=config.branching.branches,
        fork=config.sampling.steps - n,
    )


def cut(groups: Sequence[Group], size: int, first: int = 0, **same: Any) -> list[WorkUnit]:
    """Groups in work units of `size`, whose indices start at `first`; `same` are the fields that
    all units share."""
    parts = [tuple(groups[low : low + size]) for low in range(0, len(groups), size)]
    return [WorkUnit(index=index, groups=part, **same) for index, part in enumerate(parts, first)]


@dataclass
class RewardWindow:
    """Rewards of each prompt over the last stages (the released code keeps eight earlier ones)."""

    stages: int
    rewards: dict[str, list[list[float]]] = field(default_factory=dict)

    def with_stage(self, prompts: Sequence[str], rewards: np.ndarray) -> RewardWindow:
        """A window that also holds this stage's rewards.

        Args:
            prompts: the prompt of each of G groups.
            rewards: float, shape (G, K).
        """
        fresh: dict[str, list[float]] = {}
        for prompt, row in zip(prompts, rewards, strict=True):
            fresh.setdefault(prompt, []).extend(float(r) for r in row)
        kept = {p: list(rounds) for p, rounds in self.rewards.items()}
        for prompt, values in fresh.items():
            kept[prompt] = [*kept.get(prompt, []), values][-(self.stages + 1) :]
        return RewardWindow(self.stages, kept)

    def statistics(self, min_count: int) -> Mapping[str, tuple[float, float]]:
        """(mean, std) of each prompt; of all prompts together where a prompt has too few."""
        flat = {p: np.concatenate([np.asarray(r) for r in rs]) for p, rs in self.rewards.items()}
        pooled = np.concatenate(list(flat.values())) if flat else np.zeros(0)
        used = {p: (v if len(v) >= min_count else pooled) for p, v in flat.items()}
        return {
            p: (float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0)
            for p, v in used.items()
        }

    def variance(self, branches: int) -> float | None:
        """What the rewards of one prompt vary by in all, in the mean over prompts; None if no
        prompt has two groups here.

        It does not depend on where groups fork. Analysis of variance: the means of groups also
        scatter by the branches that they are means of, which is taken off.

        Args:
            branches: K, of all stages.
        """
        found = []  # of each prompt: within groups, of their means, and degrees of freedom
        for rounds in self.rewards.values():
            groups = np.concatenate([np.asarray(r) for r in rounds]).reshape(-1, branches)
            if len(groups) > 1:
                within = groups.var(axis=1, ddof=1).mean() if branches > 1 else 0.0
                found.append((within, groups.mean(axis=1).var(ddof=1), len(groups) - 1))
        if not found:
            return None
        each = np.array(found)
        within, means = np.average(each[:, :2], axis=0, weights=each[:, 2])
        return float(within + max(0.0, means - within / branches))


def advantages(
    rewards: np.ndarray, prompts: Sequence[str], window: RewardWindow, config: Advantage
) -> np.ndarray:
    """The advantage of every leaf, float32, shape (G, K).

    Centred on the `group`, (r - mean of the group) / std of the prompt's window: a lucky prefix
    cancels. Centred on the `prompt`, the z-score of r in the prompt's window, as released and as in
    DDPO. Scaled by the `group`, its own standard deviation stands below the line (GRPO, arXiv
    2402.03300, section 4.1.2).

    Args:
        rewards: float, shape (G, K).
        prompts: the prompt of each group.
        window: the rewards seen so far, this stage's included.
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
    """Which leaves are trained on: bool, shape (G, K).

    Groups whose leaves tie (within `min_gap`) are skipped: their best and worst leaf would be the
    same one, with two opposite advantages.
    """
    g, k = rewards.shape
    spread = rewards.max(axis=1) - rewards.min(axis=1)
    live = (spread > config.min_gap) if k > 1 else np.ones(g, bool)
    if config.kind == "all":
        return np.repeat(live[:, None], k, axis=1)
    rows = np.arange(g)
    best, worst = rewards.argmax(axis=1), rewards.argmin(axis=1)
    keep_best = live & (
        np.full(g, True)
        if config.best_above is None
        else advantage[rows, best] >= config.best_above
    )
    keep_worst = live & (
        np.full(g, True)
        if config.worst_below is None
        else advantage[rows, worst] < config.worst_below
    )
    if config.require_pair:
        keep_best = keep_worst = keep_best & keep_worst
    chosen = np.zeros((g, k), bool)
    chosen[rows[keep_best], best[keep_best]] = True
    chosen[rows[keep_worst], worst[keep_worst]] = True
    return chosen


def spread(rewards: np.ndarray, chosen: np.ndarray, window: RewardWindow) -> dict[str, float]:
    """How much the branches of a group differ, against how much the groups do.

    The branches' share is of what one prompt's rewards vary by in the whole window, as a stage may
    have one group of each prompt. While the window has no more either, there is no share.

    Args:
        rewards: float, shape (G, K).
        chosen: bool, shape (G, K).
        window: the rewards seen so far, this stage's included.
    """
    k = rewards.shape[1]
    within = float(rewards.var(axis=1, ddof=1).mean()) if k > 1 else 0.0
    total = window.variance(k)
    share = {}
    if total is not None:  # the stage's own branches may differ more than the window's do
        share["branch/within_share"] = within / max(total, within) if within else 0.0
    return {
        **share,
        "branch/within_std": float(rewards.std(axis=1).mean()) if k > 1 else 0.0,
        "branch/between_std": float(rewards.mean(axis=1).std()),
        "branch/pair_rate": float((chosen.sum(axis=1) >= min(2, k)).mean()),
        "branch/selected": float(chosen.mean()),
    }
