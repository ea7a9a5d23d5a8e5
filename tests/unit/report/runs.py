"""Runs' folders for the page, written by what writes them in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from b2ray.config import Config
from b2ray.config.load import validated
from b2ray.diffusion.pictures import thumbnail
from b2ray.tracking import branch_trees as trees
from b2ray.tracking.folder import RunFolder, open_run
from b2ray.tracking.show import save_png, strip

PROMPTS = ["a red circle", "a <blue> square & more", "a green ring"]
COUNT = 24  # pictures of an evaluation


def settings(runs: Path, **over: Any) -> Config:
    """A configuration with a held-out judge."""
    values: dict[str, Any] = {
        "name": "mine",
        "runs": str(runs),
        "prompts": {"train": "p.txt", "heldout": "h.txt"},
        "rewards": [{"name": "clip", "kind": "clip"}],
        "sampling": {"steps": 10},
        "curriculum": {"stages": 6, "start": 4, "end": 9},
        "branching": {"images": 64, "branches": 4},
        "evaluation": {
            "every": 2,
            "previews": 4,
            "heldout_rewards": [{"name": "judge", "kind": "jpeg"}],
        },
    }
    return validated({**values, **over})


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8, (count, size, size, 3), no two alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def write_run(
    config: Config,
    done: int | None = None,
    rises: float = 0.3,
    judged: float = 0.1,
    size: int = 32,
    with_trees: bool = True,
) -> RunFolder:
    """A run's folder after `done` of its stages.

    Args:
        rises: by how much the reward rises over the stages, on fixed seeds.
        judged: the same of the held-out judge.
        size: pixels of its pictures' sides.
    """
    stages = config.curriculum.stages
    done = stages if done is None else done
    with open_run(config) as folder:
        for step in range(done + 1):
            at = step / stages
            figures: dict[str, float] = {"time/total": 5.0 + 9.0 * step}
            if step:
                figures |= _of_a_stage(config, step, at * rises)
            every = config.evaluation.every
            if step in (0, stages) or (every and step % every == 0):
                figures |= _evaluate(folder, step, at * rises, at * judged, size)
            if step and with_trees:
                trees.save(folder.path, step, [tree(config, step, g, size) for g in range(2)])
            folder.append_metrics(step, figures, [])
    return folder


def tree(config: Config, step: int, group: int, size: int) -> trees.Tree:
    """A group whose first leaf is the best and whose last is the worst."""
    branches = config.branching.branches
    files = [thumbnail(p) for p in pictures(branches + 1, size, 100 * step + group)]
    leaves = tuple(
        trees.TreeLeaf(file, 1.0 - k / 4, {"clip": 1.0 - k / 4}, 1.5 - k, k in (0, branches - 1))
        for k, file in enumerate(files[1:])
    )
    return trees.Tree(PROMPTS[group + 1], min(9, 3 + step), files[0], leaves)


def _of_a_stage(config: Config, step: int, risen: float) -> dict[str, float]:
    own = {"reward/mean": 0.2 + risen, "reward/clip": 0.2 + risen}
    if not config.rewards:
        own = {"demonstrations/kl": 1.0 / step}
    return {
        **own,
        "interval": float(min(9, 3 + step)),
        "cost/reward_queries": 64.0 * step if config.rewards else 0.0,
        "cost/unet_evals": 1000.0 * step,
        "time/sample": 3.0,
        "time/update": 4.0 + step / 10,
        "time/sync": 0.25,
    }


def _evaluate(
    folder: RunFolder, step: int, risen: float, judged: float, size: int
) -> dict[str, float]:
    stages = folder.config.curriculum.stages
    figures = {"diversity/pairwise": 0.4 - risen / 4, "diversity/vendi": 2.5 - risen}
    for which, name in enumerate(("train", "heldout")):
        if name == "heldout" and step not in (0, stages):
            continue
        noise = np.random.default_rng(which).normal(0, 0.2, COUNT)  # the same seeds every time
        more = np.random.default_rng(which + 10 * step).normal(0, 0.01, COUNT)
        scores = {"clip": 0.4 + risen + noise + more, "judge": 0.5 + judged + noise + more}
        if folder.config.rewards:
            scores["reward"] = scores["clip"]
        folder.save_scores(step, name, [PROMPTS[i % 3] for i in range(COUNT)], scores)
        figures |= {f"eval/{name}/{k}": float(v.mean()) for k, v in scores.items()}
        kept = min(folder.config.evaluation.previews, COUNT)
        if kept:
            file = folder.pictures / f"step-{step:05d}" / f"{name}_strip.png"
            save_png(strip(pictures(kept, size, step)), file)
    return figures


def event(what: str, time: float, slot: str = "sampler 0", **more: Any) -> dict[str, Any]:
    """A line of fleet.jsonl."""
    return {
        "time": time, "slot": slot, "what": what, "where": "host (pid 3, node ab12)",
        "doing": "", "cause": "", "seconds": None, **more,
    }  # fmt: skip
