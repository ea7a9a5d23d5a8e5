"""Branch trees for people to look at: thumbnails of a few groups of a stage, with their scores.

The sampler makes the thumbnails, because the pictures are in its process. The driver writes them
and the scores into one folder per stage: trees/stage-00007/tree.json, group0_fork.jpg,
group0_leaf0.jpg, and so on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from b2ray.diffusion.pictures import FORK
from b2ray.rollout.stage import StageRewards

TEXT = "tree.json"
PNG = b"\x89PNG"


@dataclass(frozen=True)
class TreeLeaf:
    """The end of one branch.

    Attributes:
        picture: the content of a PNG or JPEG file.
        reward: the weighted sum of the rewards, by which leaves are selected.
        scores: the raw score by the name of the reward.
        advantage: how much better the reward is than expected for the prompt.
        selected: whether the leaf is trained on.
    """

    picture: bytes
    reward: float
    scores: dict[str, float]
    advantage: float
    selected: bool


@dataclass(frozen=True)
class Tree:
    """A group: one shared prefix and its branches.

    Attributes:
        prompt: the text that all branches are conditioned on.
        interval: n, the number of denoising steps after the fork.
        fork: the final picture as the model predicts it at the fork, the content of a PNG or JPEG
            file.
        leaves: the ends of the branches.
    """

    prompt: str
    interval: int
    fork: bytes
    leaves: tuple[TreeLeaf, ...]


def trees_of(
    prompts: Sequence[str],
    interval: int,
    thumbnails: Mapping[tuple[int, int], bytes],
    rewards: StageRewards,
    advantage: np.ndarray,
    chosen: np.ndarray,
) -> list[Tree]:
    """Build the trees of those groups of a stage that have thumbnails, which are the first ones.

    Args:
        prompts: the prompt of each of the G groups.
        interval: n, the number of denoising steps after the fork.
        thumbnails: the contents of picture files by (group, branch or `FORK`).
        rewards: the rewards of all leaves, as tables of shape (G, K).
        advantage: the advantages of all leaves, shape (G, K).
        chosen: whether each leaf is trained on, bool, shape (G, K).
    """
    trees = []
    for g in sorted({group for group, _ in thumbnails}):
        leaves = tuple(
            TreeLeaf(
                thumbnails[g, k],
                float(rewards.total[g, k]),
                {name: float(table[g, k]) for name, table in rewards.tables.items()},
                float(advantage[g, k]),
                bool(chosen[g, k]),
            )
            for k in range(advantage.shape[1])
        )
        trees.append(Tree(prompts[g], interval, thumbnails[g, FORK], leaves))
    return trees


def save(folder: Path, stage: int, trees: Sequence[Tree]) -> None:
    """Write the trees of a stage.

    Args:
        folder: the run's folder.
        stage: the stage's number.
        trees: replace those that an earlier try of the stage has written.

    Raises:
        OSError: the disk refuses.
    """
    stage_folder = _stage_folder(folder, stage)
    stage_folder.mkdir(parents=True, exist_ok=True)
    # tree.json is removed first and written last, so that readers find all trees or none.
    (stage_folder / TEXT).unlink(missing_ok=True)
    groups = []
    for g, tree in enumerate(trees):
        _write(stage_folder, g, FORK, tree.fork)
        for k, leaf in enumerate(tree.leaves):
            _write(stage_folder, g, k, leaf.picture)
        leaves = [asdict(leaf) for leaf in tree.leaves]
        for values in leaves:
            del values["picture"]
        groups.append({"prompt": tree.prompt, "interval": tree.interval, "leaves": leaves})
    part = stage_folder / f"{TEXT}.part"
    part.write_text(json.dumps(groups, ensure_ascii=False), encoding="utf-8")
    os.replace(part, stage_folder / TEXT)


def stages(folder: Path) -> list[int]:
    """Return the numbers of the stages whose trees are in a run's folder, in ascending order."""
    names = (p.parent.name for p in (folder / "trees").glob(f"stage-*/{TEXT}"))
    return sorted(int(name[6:]) for name in names if re.fullmatch(r"stage-\d{5,}", name))


def load(folder: Path, stage: int) -> list[Tree]:
    """Read the trees of a stage from a run's folder.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError, KeyError, TypeError: tree.json does not have the format that `save` writes.
    """
    stage_folder = _stage_folder(folder, stage)
    groups = json.loads((stage_folder / TEXT).read_text(encoding="utf-8"))
    return [
        Tree(
            group["prompt"],
            group["interval"],
            _read(stage_folder, g, FORK),
            tuple(
                TreeLeaf(_read(stage_folder, g, k), **leaf)
                for k, leaf in enumerate(group["leaves"])
            ),
        )
        for g, group in enumerate(groups)
    ]


def _stage_folder(folder: Path, stage: int) -> Path:
    return folder / "trees" / f"stage-{stage:05d}"


def _name(group: int, branch: int) -> str:
    return f"group{group}_fork" if branch == FORK else f"group{group}_leaf{branch}"


def _write(stage_folder: Path, group: int, branch: int, picture: bytes) -> None:
    suffix = ".png" if picture.startswith(PNG) else ".jpg"
    (stage_folder / f"{_name(group, branch)}{suffix}").write_bytes(picture)


def _read(stage_folder: Path, group: int, branch: int) -> bytes:
    name = _name(group, branch)
    candidates = (stage_folder / f"{name}.png", stage_folder / f"{name}.jpg")
    file = next((f for f in candidates if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{stage_folder / name} has no picture")
    return file.read_bytes()
