"""Evaluation: fixed seeds, fixed prompts, every reward, and how different the pictures are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from b2ray.branching import Group, WorkUnit
from b2ray.config import Config
from b2ray.diffusion.noise import Domain
from b2ray.fleet.plans import Rollout


@dataclass(frozen=True)
class Evaluated:
    """Figures of one prompt set.

    Attributes:
        scores: by reward, float64, shape (N,), in the order of the pictures; `reward` is the
            weighted sum that is trained on.
        pairwise: mean within-prompt 1 - cosine of image embeddings; 0 means all alike.
        vendi: mean within-prompt Vendi score, the effective number of different pictures.
        pictures: refs of the first calls' pictures, in order.
    """

    scores: dict[str, np.ndarray]
    pairwise: float
    vendi: float
    pictures: list[Any]
    unet_evals: int

    def mean(self, name: str, count: int | None = None) -> float:
        """Mean of the first `count` pictures' scores."""
        return float(self.scores[name][:count].mean())


def evaluation_units(
    config: Config, prompts: Sequence[str], which: int, version: int, count: int
) -> list[WorkUnit]:
    """Work units of one unforked leaf a group; picture i is of prompt i modulo their number.

    The first pictures of a longer evaluation are those of a shorter one.
    """
    groups = [Group(i, prompts[i % len(prompts)]) for i in range(count)]
    size = config.evaluation.batch
    return [
        WorkUnit(
            seed=config.seed,
            domain=Domain.EVALUATE,
            stage=which,
            version=version,
            index=u,
            groups=tuple(groups[low : low + size]),
            branches=1,
            fork=0,
        )
        for u, low in enumerate(range(0, count, size))
    ]


def evaluate(
    run_plan: Callable[[Any], None],
    config: Config,
    prompts: Sequence[str],
    which: int,
    version: int,
    count: int,
    progress: Callable[[int], Any],
) -> Evaluated:
    """Sample and score `count` pictures of a prompt set with the current policy."""
    trained = [r.name for r in config.rewards]
    names = [*trained, *(r.name for r in config.evaluation.heldout_rewards)]
    units = evaluation_units(config, prompts, which, version, count)
    plan = Rollout(
        units,
        config.evaluation.batch,
        names,
        record=False,
        embed=True,
        keep_pictures=config.evaluation.previews,
        progress=progress,
    )
    run_plan(plan)
    scores = {name: plan.reward_table(name)[:, 0] for name in names}
    scores["reward"] = total_reward(config, scores)
    pairwise = vendi = float("nan")
    if plan.embeddings:
        vectors = np.stack([plan.embeddings[key] for key in sorted(plan.embeddings)])
        pairwise, vendi = diversity(vectors, [units_prompt(units, i) for i in range(count)])
    pictures = [plan.pictures[key] for key in sorted(plan.pictures)]
    return Evaluated(scores, pairwise, vendi, pictures, plan.unet_evals)


def total_reward(config: Config, scores: dict[str, np.ndarray]) -> np.ndarray:
    """The weighted sum that is trained on."""
    return np.sum([r.weight * scores[r.name] for r in config.rewards], axis=0)


def units_prompt(units: Sequence[WorkUnit], picture: int) -> str:
    """The prompt of a picture of `evaluation_units`."""
    size = len(units[0].groups)
    return units[picture // size].groups[picture % size].prompt


def diversity(vectors: np.ndarray, prompts: Sequence[str]) -> tuple[float, float]:
    """(mean pairwise 1 - cosine, mean Vendi score) within each prompt, averaged over prompts.

    The Vendi score (arXiv 2210.02410, definition 3.1) is the exponential of the entropy of the
    eigenvalues of the similarity matrix divided by its size; here of cosines. Prompts with one
    picture have no pairs and are left out; NaN if all are.

    Args:
        vectors: unit embeddings, shape (N, D).
        prompts: the prompt of each.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    pairwise, vendi = [], []
    for rows in by_prompt.values():
        n = len(rows)
        if n < 2:
            continue
        cosines = (vectors[rows] @ vectors[rows].T).astype(np.float64)
        pairwise.append(1 - (cosines.sum() - np.trace(cosines)) / (n * (n - 1)))
        eigenvalues = np.linalg.eigvalsh(cosines / n).clip(1e-12)
        vendi.append(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    if not pairwise:
        return float("nan"), float("nan")
    return float(np.mean(pairwise)), float(np.mean(vendi))
