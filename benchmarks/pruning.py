"""What would be lost and saved if branches were dropped early, by their predicted pictures?

    python benchmarks/pruning.py [--groups 96] [--branches 8]   # docs/performance.md's table

The embedded model, the quickstart's captions, interval and reward. All branches of a group are
denoised for a few steps, the pictures that the UNet predicts in the last of them are scored, and
only the best and the worst by that go on. The gap in reward between those two is what such a pair
teaches; it is held against that of the best and worst of all branches, and of as many unpruned
branches as cost as many UNet evaluations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np
import torch
from tables import fill, markdown
from tqdm import tqdm

from b2ray.checks import check_files
from b2ray.config import Config
from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.options import parse
from b2ray.rewards import Panel

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
GROUPS_A_CALL = 8


def main() -> None:
    """Measure, and fill docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=96)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    arguments = parser.parse_args()
    config = parse([f"--config={QUICKSTART}", f"--branching.branches={arguments.branches}"]).config
    scores = score_predictions(config, arguments.groups)
    fill(arguments.output, {"pruning": table(scores)})


def score_predictions(config: Config, groups: int) -> np.ndarray:
    """Rewards, float, shape (n, G, K): of the pictures predicted in the branches' 2nd .. n-th
    evaluations (all have one x in the first), and of the finished ones."""
    prompts = check_files(config).train.texts
    policy = Policy(config, torch.device("cpu"))
    panel, steps = Panel(config.rewards, policy.device), config.sampling.steps
    (reward,) = panel.rewards
    k, fork = config.branching.branches, steps - config.interval_bounds[0]
    found = []
    for low in tqdm(range(0, groups, GROUPS_A_CALL)):
        rows = range(low, min(low + GROUPS_A_CALL, groups))
        texts = [prompts[i % len(prompts)] for i in rows]
        x = torch.from_numpy(_noise(policy, [(i, PREFIX) for i in rows], INITIAL))
        prefix = policy.denoise(
            x, texts, 0, fork, lambda s, r=rows: _noise(policy, [(i, PREFIX) for i in r], s + 1)
        )
        leaves = [(i, PREFIX + 1 + j) for i in rows for j in range(k)]
        texts = [text for text in texts for _ in range(k)]
        x, scores = prefix.latents[:, -1].repeat_interleave(k, 0), []
        for step in range(fork, steps):
            taken = policy.denoise(
                x, texts, step, step + 1, lambda s, w=leaves: _noise(policy, w, s + 1)
            )
            if step > fork:
                assert taken.predicted is not None
                pictures = policy.decode(taken.predicted)
                scores.append(panel.score(pictures, texts, [reward])[reward])
            x = taken.latents[:, -1]
        scores.append(panel.score(policy.decode(x), texts, [reward])[reward])
        found.append(np.stack(scores).reshape(len(scores), len(rows), k))
    return np.concatenate(found, axis=1)


def table(scores: np.ndarray) -> str:
    """By the evaluations before the drop: how well predictions tell, the pair's gap, its cost.

    Args:
        scores: as `score_predictions` has them.
    """
    n, groups, k = scores.shape
    final, rows = scores[-1], []
    which = np.arange(groups)
    whole = gap_of(final, k)
    for made in range(2, n + 1):
        early = scores[made - 2]
        together = [np.corrcoef(a, b)[0, 1] for a, b in zip(early, final, strict=True)]
        gap = (final[which, early.argmax(1)] - final[which, early.argmin(1)]).mean()
        work = k * made + 2 * (n - made)
        same = gap_of(final, work / n)
        cells = [f"{np.nanmean(together):.2f}", f"{gap:.3f}", f"{work / (k * n):.0%}"]
        rows.append([str(made), *cells, f"{same:.3f}", f"{gap / same - 1:+.0%}"])
    rows.append(["none dropped", "1", f"{whole:.3f}", "100%", f"{whole:.3f}", "+0%"])
    heads = [
        *("evaluations before the drop", "correlation with the finished", "gap of the pair"),
        *("UNet work of the branches", "gap of as much work unpruned", "difference"),
    ]
    return markdown(heads, rows)


def gap_of(rewards: np.ndarray, count: float) -> float:
    """Expected gap between best and worst of `count` of a group's leaves, the mean over groups.

    Exact over all subsets; between whole numbers it is linear.

    Args:
        rewards: float, shape (G, K).
        count: from 2 to K.
    """
    low = int(count)
    if low < count:
        share = count - low
        return (1 - share) * gap_of(rewards, low) + share * gap_of(rewards, low + 1)
    ordered = np.sort(rewards, axis=1)
    k = rewards.shape[1]
    highest = np.array([comb(i, low - 1) for i in range(k)]) / comb(k, low)
    return float((ordered @ (highest - highest[::-1])).mean())


def _noise(policy: Policy, leaves: Sequence[tuple[int, int]], word: int) -> np.ndarray:
    seed, shape = policy.config.seed, policy.latent_shape
    return normal(seed, Domain.TRAIN, 0, leaves, word, shape)


if __name__ == "__main__":
    main()
