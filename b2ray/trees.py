"""Branch trees to look at: small pictures of a few groups of a stage, and what their leaves got.

A sampler makes the small pictures where the large ones are. The driver writes them beside the
scores, a folder a stage: trees/stage-00007/tree.json, group0_fork.jpg, group0_leaf0.jpg, …
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FORK = -1  # stands where a leaf has its branch
SIDE = 128  # pixels of a picture's longer side, at the most
EXACT = 64  # up to this size a picture is kept as it is
TEXT = "tree.json"
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Leaf:
    """One branch's end.

    Attributes:
        picture: a PNG or JPEG file's content.
        reward: what it is selected by, the weighted sum.
        scores: of each reward, as it was scored.
        selected: whether it is trained on.
    """

    picture: bytes
    reward: float
    scores: dict[str, float]
    advantage: float
    selected: bool


@dataclass(frozen=True)
class Tree:
    """A group: its prefix and its branches.

    Attributes:
        interval: n, the steps after the fork.
        fork: the image that the model predicts where the branches part, as a file's content.
    """

    prompt: str
    interval: int
    fork: bytes
    leaves: tuple[Leaf, ...]


def small(picture: np.ndarray) -> bytes:
    """A picture (uint8, (height, width, 3)) as a small file: PNG if it is small, else JPEG."""
    image, file = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= EXACT:
        image.save(file, format="PNG")
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=85)
    return file.getvalue()


def save(folder: Path, stage: int, trees: Sequence[Tree]) -> None:
    """Write a stage's trees; the text comes last, so that they are all there or none.

    Raises:
        OSError: the disk refuses.
    """
    place = _place(folder, stage)
    place.mkdir(parents=True, exist_ok=True)
    (place / TEXT).unlink(missing_ok=True)
    groups = []
    for g, tree in enumerate(trees):
        _write(place, g, FORK, tree.fork)
        for k, leaf in enumerate(tree.leaves):
            _write(place, g, k, leaf.picture)
        leaves = [asdict(leaf) for leaf in tree.leaves]
        for values in leaves:
            del values["picture"]
        groups.append({"prompt": tree.prompt, "interval": tree.interval, "leaves": leaves})
    part = place / f"{TEXT}.part"
    part.write_text(json.dumps(groups, ensure_ascii=False), encoding="utf-8")
    os.replace(part, place / TEXT)


def stages(folder: Path) -> list[int]:
    """The stages that have trees."""
    found = (p.parent.name for p in (folder / "trees").glob(f"stage-*/{TEXT}"))
    return sorted(int(name[6:]) for name in found if re.fullmatch(r"stage-\d{5,}", name))


def load(folder: Path, stage: int) -> list[Tree]:
    """The trees of a stage.

    Raises:
        OSError, ValueError, KeyError, TypeError: a file is missing or is none of ours.
    """
    place = _place(folder, stage)
    groups = json.loads((place / TEXT).read_text(encoding="utf-8"))
    return [
        Tree(
            group["prompt"],
            group["interval"],
            _read(place, g, FORK),
            tuple(Leaf(_read(place, g, k), **leaf) for k, leaf in enumerate(group["leaves"])),
        )
        for g, group in enumerate(groups)
    ]


def _place(folder: Path, stage: int) -> Path:
    return folder / "trees" / f"stage-{stage:05d}"


def _name(group: int, branch: int) -> str:
    return f"group{group}_fork" if branch == FORK else f"group{group}_leaf{branch}"


def _write(place: Path, group: int, branch: int, picture: bytes) -> None:
    suffix = ".png" if picture.startswith(PNG) else ".jpg"
    (place / f"{_name(group, branch)}{suffix}").write_bytes(picture)


def _read(place: Path, group: int, branch: int) -> bytes:
    name = _name(group, branch)
    file = next((f for f in (place / f"{name}.png", place / f"{name}.jpg") if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{place / name} has no picture")
    return file.read_bytes()
