"""Evaluation: fixed seeds, fixed prompts, every reward, and how different the pictures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from b2ray.branching import Group, WorkUnit, cut
from b2ray.config import Config
from b2ray.diffusion.noise import Domain
from b2ray.fleet.rollout import Rollout
from b2ray.rewards.combine import Statistics, combine, statistics


@dataclass(frozen=True)
class Evaluated:
    """Figures of one prompt set.

    Attributes:
        scores: by reward, float64, shape (N,), in the order of the pictures; `reward` is the
            weighted sum that is trained on, if rewards are.
        prompts: the prompt of each picture.
        vectors: unit embeddings, shape (N, D); None if no reward has them.
        pictures: the first calls' pictures, in order, each uint8 (N, height, width, 3).
        reference: (mean, std) of the rewards with `scale=window` that were used.
    """

    scores: dict[str, np.ndarray]
    prompts: list[str]
    vectors: np.ndarray | None
    pictures: list[np.ndarray]
    reference: Statistics

    def means(self, count: int) -> dict[str, float]:
        """Mean scores and the diversity of the first `count` pictures, by name.

        Diversity is left out where no prompt has two pictures. It depends on how many pictures a
        prompt has: compare only figures of the same count.
        """
        means = {name: float(values[:count].mean()) for name, values in self.scores.items()}
        if self.vectors is not None:
            pairwise, vendi = diversity(self.vectors[:count], self.prompts[:count])
            if not np.isnan(pairwise):
                means |= {"pairwise": pairwise, "vendi": vendi}
        return means


def evaluation_units(
    config: Config, prompts: Sequence[str], which: int, version: int, count: int
) -> list[WorkUnit]:
    """Work units of one unforked leaf a group; picture i is of prompt i modulo their number.

    The first pictures of a longer evaluation are those of a shorter one.
    """
    groups = [Group(i, prompts[i % len(prompts)]) for i in range(count)]
    return cut(
        groups,
        config.evaluation.batch,
        seed=config.seed,
        domain=Domain.EVALUATE,
        stage=which,
        version=version,
        branches=1,
        fork=0,
    )


def evaluated(config: Config, plan: Rollout, reference: Statistics | None) -> Evaluated:
    """The figures of a finished rollout of `evaluation_units`.

    Rewards with `scale=window` are standardised by `reference`, the statistics of the run's first
    evaluation, so that the sum means the same at every evaluation; None: this is the first.
    """
    scores = {r.name: plan.reward_table(r.name)[:, 0] for r in config.all_rewards}
    reference = statistics(config.rewards, scores) if reference is None else reference
    if config.rewards:
        scores["reward"] = combine(config.rewards, scores, reference)
    pictures = [plan.pictures[key] for key in sorted(plan.pictures)]
    texts = [group.prompt for unit in plan.units for group in unit.groups]
    return Evaluated(scores, texts, plan.vectors(), pictures, reference)


def overtaken(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], heldout: Sequence[str]
) -> list[str]:
    """The held-out rewards that fell while `reward` rose: reward hacking, most likely.

    Both by more than two standard errors of the mean difference of the same seeds; the shorter of
    the two evaluations counts, whose pictures are the first of the longer one's.

    Args:
        before, after: scores by reward, arrays of shape (N,).
        heldout: names of the rewards to look at.
    """

    if "reward" not in before:
        return []  # demonstrations are trained on

    def rise(name: str) -> float:
        n = min(len(before[name]), len(after[name]))
        change = after[name][:n] - before[name][:n]
        error = change.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
        return float(change.mean() / error) if error > 0 else 0.0

    return [name for name in heldout if rise("reward") > 2 and rise(name) < -2]


def diversity(vectors: np.ndarray, prompts: Sequence[str]) -> tuple[float, float]:
    """(mean pairwise 1 - cosine, mean Vendi score) within each prompt, averaged over prompts.

    NaN if no prompt has two pictures. The arguments are those of `diversities`.
    """
    found = list(diversities(vectors, prompts).values())
    if not found:
        return float("nan"), float("nan")
    pairwise, vendi = zip(*found, strict=True)
    return float(np.mean(pairwise)), float(np.mean(vendi))


def diversities(vectors: np.ndarray, prompts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(mean pairwise 1 - cosine, Vendi score) of the pictures of each prompt.

    The Vendi score (arXiv 2210.02410, definition 3.1) is the exponential of the entropy of the
    eigenvalues of the similarity matrix divided by its size; here of cosines. Prompts with one
    picture have no pairs and are left out.

    Args:
        vectors: unit embeddings, shape (N, D).
        prompts: the prompt of each.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    found = {}
    for prompt, rows in by_prompt.items():
        n = len(rows)
        if n < 2:
            continue
        cosines = (vectors[rows] @ vectors[rows].T).astype(np.float64)
        pairwise = 1 - (cosines.sum() - np.trace(cosines)) / (n * (n - 1))
        eigenvalues = np.linalg.eigvalsh(cosines / n).clip(1e-12)
        found[prompt] = pairwise, np.exp(-(eigenvalues * np.log(eigenvalues)).sum())
    return found
