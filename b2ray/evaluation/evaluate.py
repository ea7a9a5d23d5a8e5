"""Evaluation of a policy on fixed seeds and prompts: every reward, and the pictures' diversity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from b2ray.actors.worker import UNBOUND
from b2ray.algorithm.branching import Group, WorkUnit, cut
from b2ray.config import DIVERSITY, Config
from b2ray.diffusion.noise import Domain
from b2ray.rewards.combine import Statistics, combine, statistics
from b2ray.rollout.rollout import RolloutPlan
from b2ray.rollout.versions import PolicyVersions
from b2ray.rollout.workers import Workers


@dataclass(frozen=True)
class Evaluation:
    """Scores of a policy's pictures of one prompt set.

    Attributes:
        scores: by name of the reward, float64, shape (N,), in the order of the pictures; `reward`
            is the weighted sum that is trained on, if there are trained rewards.
        prompts: the prompt of each picture.
        vectors: unit embeddings of the pictures, shape (N, D); None if no reward computes them.
        pictures: the pictures of the first calls, in order, each uint8 (N, height, width, 3).
        reference: the (mean, std) by which the rewards with `scale=window` were standardised.
    """

    scores: dict[str, np.ndarray]
    prompts: list[str]
    vectors: np.ndarray | None
    pictures: list[np.ndarray]
    reference: Statistics

    def means(self, count: int) -> dict[str, float]:
        """The mean scores and the diversity of the first `count` pictures, by name.

        Diversity is left out if no prompt has two pictures. It depends on how many pictures each
        prompt has: compare it only between equal counts.
        """
        means = {name: float(values[:count].mean()) for name, values in self.scores.items()}
        if self.vectors is not None:
            measures = diversity(self.vectors[:count], self.prompts[:count])
            if not np.isnan(measures).any():
                means |= dict(zip(DIVERSITY, measures, strict=True))
        return means


def evaluate(
    workers: Workers,
    versions: PolicyVersions,
    prompts: Sequence[str],
    which: int,
    count: int,
    reference: Statistics | None,
    progress: Callable[[int], Any],
) -> Evaluation:
    """Sample pictures of the newest policy version with fixed seeds, and score them.

    If no weights were ever bound, the policy is the base model.

    Args:
        workers: the actors that sample and score.
        versions: the policy versions, of which the newest is evaluated.
        prompts: the prompt set.
        which: number of the prompt set, which keys its seeds.
        count: how many pictures to sample.
        reference: the (mean, std) of the rewards with `scale=window` at the run's first evaluation,
            so that their sum means the same in every evaluation; None if this is the first.
        progress: called with the number of pictures whenever some are done.
    """
    workers.gauges.phase("evaluating")
    config, version = workers.config, versions.newest_number
    if version != UNBOUND:
        versions.sample_from(version)
    plan = RolloutPlan(
        evaluation_units(config, prompts, which, version, count),
        config.evaluation.batch,
        workers.scorers,
        [r.name for r in config.all_rewards],
        record=False,
        embed=True,
        keep_pictures=config.evaluation.previews,
        progress=progress,
    )
    workers.run(plan)
    return evaluation_of(config, plan, reference)


def evaluation_units(
    config: Config, prompts: Sequence[str], which: int, version: int, count: int
) -> list[WorkUnit]:
    """The work units of an evaluation: each group has a single leaf and is not forked.

    Picture i has prompt i modulo the number of prompts, so that the first pictures of a longer
    evaluation are those of a shorter one. The arguments are those of `evaluate`; `version` is the
    policy's.
    """
    groups = [Group(i, prompts[i % len(prompts)]) for i in range(count)]
    unit = WorkUnit(
        seed=config.seed,
        domain=Domain.EVALUATE,
        stage=which,
        version=version,
        branches=1,
        fork=0,
    )
    return cut(groups, config.evaluation.batch, unit)


def evaluation_of(config: Config, plan: RolloutPlan, reference: Statistics | None) -> Evaluation:
    """Collect the scores of a finished rollout of `evaluation_units`.

    Args:
        config: the run's configuration.
        plan: the rollout.
        reference: see `evaluate`.
    """
    scores = {r.name: plan.reward_table(r.name)[:, 0] for r in config.all_rewards}
    reference = statistics(config.rewards, scores) if reference is None else reference
    if config.rewards:
        scores["reward"] = combine(config.rewards, scores, reference)
    pictures = [plan.pictures[key] for key in sorted(plan.pictures)]
    texts = [group.prompt for unit in plan.units for group in unit.groups]
    return Evaluation(scores, texts, plan.vectors(), pictures, reference)


def overtaken(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], heldout: Sequence[str]
) -> list[str]:
    """The held-out rewards that fell while `reward` rose, which is most likely reward hacking.

    A reward has risen or fallen if its mean changed by more than two standard errors, over pairs of
    pictures with equal seeds. If the evaluations have different lengths, the first pictures of the
    longer one are compared with the shorter one.

    Args:
        before: scores by name of the reward, arrays of shape (N,).
        after: the same after training.
        heldout: names of the held-out rewards.
    """
    if "reward" not in before:
        return []  # the run learns from demonstrations

    def rise(name: str) -> float:
        """The mean change in standard errors; 0 where it has none."""
        n = min(len(before[name]), len(after[name]))
        change = after[name][:n] - before[name][:n]
        error = change.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
        return float(change.mean() / error) if error > 0 else 0.0

    return [name for name in heldout if rise("reward") > 2 and rise(name) < -2]


def diversity(vectors: np.ndarray, prompts: Sequence[str]) -> tuple[float, float]:
    """The (mean pairwise 1 - cosine, Vendi score) of each prompt's pictures, averaged over prompts.

    Both are NaN if no prompt has two pictures. The arguments are those of `diversities`.
    """
    by_prompt = list(diversities(vectors, prompts).values())
    if not by_prompt:
        return float("nan"), float("nan")
    pairwise, vendi = zip(*by_prompt, strict=True)
    return float(np.mean(pairwise)), float(np.mean(vendi))


def diversities(vectors: np.ndarray, prompts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The (mean pairwise 1 - cosine, Vendi score) of each prompt's pictures, by prompt.

    The Vendi score (arXiv 2210.02410, definition 3.1) is the exponential of the entropy of the
    eigenvalues of the similarity matrix, here of cosines, divided by its size. Prompts with only
    one picture are left out.

    Args:
        vectors: unit embeddings of the pictures, shape (N, D).
        prompts: the prompt of each picture.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    scores = {}
    for prompt, rows in by_prompt.items():
        n = len(rows)
        if n < 2:
            continue
        cosines = (vectors[rows] @ vectors[rows].T).astype(np.float64)
        pairwise = 1 - (cosines.sum() - np.trace(cosines)) / (n * (n - 1))
        eigenvalues = np.linalg.eigvalsh(cosines / n).clip(1e-12)
        scores[prompt] = pairwise, np.exp(-(eigenvalues * np.log(eigenvalues)).sum())
    return scores
