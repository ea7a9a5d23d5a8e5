"""The pictures of the page: small files inside it as data: URLs, as many as its size allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from b2ray.diffusion.pictures import UNCHANGED
from b2ray.report.record import SETS, Record
from b2ray.tracking import branch_trees as trees
from b2ray.tracking.branch_trees import PNG

# The most bytes of the pictures before and after, and of the branch trees: a page has at most 3 MB.
COMPARED, BRANCHED = 1_000_000, 1_300_000
PAIRS = 12  # the most pairs of each prompt set
SIDE = 192  # the most pixels of the longer side of a picture before or after


@dataclass(frozen=True)
class Shown:
    """A picture in the page.

    Attributes:
        source: a data: URL.
        width: pixels.
        height: pixels.
    """

    source: str
    width: int
    height: int

    @property
    def sharp(self) -> bool:
        """Whether the picture is so small that the page enlarges it without smoothing."""
        return max(self.width, self.height) <= UNCHANGED


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same prompt and seed, before and after.

    Attributes:
        prompt: the prompt of both.
        before: the picture of the first evaluation.
        after: the picture of the last evaluation.
        scores: (name of the reward, score before, score after).
    """

    prompt: str
    before: Shown
    after: Shown
    scores: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Compared:
    """The pairs of one prompt set.

    Attributes:
        prompts: `train` or `heldout`, the set.
        title: the set as the page calls it.
        first: the stage of the pictures before.
        last: the stage of the pictures after.
        pairs: the pictures.
    """

    prompts: str
    title: str
    first: int
    last: int
    pairs: list[Pair]


@dataclass(frozen=True)
class ShownLeaf:
    """A leaf of a branch tree with its picture in the page."""

    picture: Shown
    leaf: trees.TreeLeaf


@dataclass(frozen=True)
class ShownTree:
    """A branch tree with its pictures in the page."""

    tree: trees.Tree
    fork: Shown
    leaves: list[ShownLeaf]


def shown(content: bytes) -> Shown:
    """Turn the content of a PNG or JPEG file into a picture of the page.

    Raises:
        OSError: the content is no such picture.
    """
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        width, height = image.size
    kind = "png" if content.startswith(PNG) else "jpeg"
    data = base64.b64encode(content).decode()
    return Shown(f"data:image/{kind};base64,{data}", width, height)


def compared(record: Record) -> list[Compared]:
    """Pair the pictures of the first and the last evaluation that has pictures, per prompt set."""
    sets = []
    for prompts, steps in record.evaluated.items():
        pictured = [s for s in steps if _strip(record, s, prompts).is_file()]
        if len(pictured) < 2:
            continue
        first, last = pictured[0], pictured[-1]
        pairs = _pairs(record, prompts, first, last)
        if pairs:
            sets.append(Compared(prompts, SETS[prompts], first, last, pairs))
    return sets


def branched(record: Record) -> list[tuple[int, list[ShownTree]]]:
    """Return (stage, branch trees) of as many stages as the size of the page allows.

    These are the first stage, the last, and others at equal distances between them.
    """
    available = [s for s in trees.stages(record.folder.path) if s <= record.stage]
    if not available:
        return []
    # The last stage serves as an estimate of how many bytes a stage takes.
    bytes_of_last = sum(_size(tree) for tree in trees.load(record.folder.path, available[-1]))
    count = max(1, BRANCHED // max(1, bytes_of_last))
    chosen, bytes_left = [], BRANCHED
    # The last stage matters most, so it is the first to take its bytes.
    for stage in reversed(_spaced(available, count)):
        loaded = trees.load(record.folder.path, stage)
        bytes_left -= sum(map(_size, loaded))
        if bytes_left < 0:
            break
        chosen.append((stage, [_shown_tree(tree) for tree in loaded]))
    return chosen[::-1]


def _spaced(values: Sequence[int], count: int) -> list[int]:
    """Choose at most `count` values at equal distances, the last one among them."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _size(tree: trees.Tree) -> int:
    """Return the bytes that the pictures of a tree take in the page, encoded in base64."""
    pictures = [tree.fork, *(leaf.picture for leaf in tree.leaves)]
    return sum(len(p) * 4 // 3 + 4 for p in pictures)


def _shown_tree(tree: trees.Tree) -> ShownTree:
    leaves = [ShownLeaf(shown(leaf.picture), leaf) for leaf in tree.leaves]
    return ShownTree(tree, shown(tree.fork), leaves)


def _strip(record: Record, step: int, prompts: str) -> Path:
    return record.folder.strip(step, prompts)


def _pairs(record: Record, prompts: str, first: int, last: int) -> list[Pair]:
    texts = record.prompts(first, prompts)
    previews = min(record.config.evaluation.previews, len(texts))
    old, new = (record.folder.scores(s, prompts) for s in (first, last))
    names = [c.name for c in record.changes if c.prompts == prompts]
    count = min(previews, PAIRS, len(record.prompts(last, prompts)))
    before, after = (
        _cut(_strip(record, s, prompts), min(previews, len(record.prompts(s, prompts))), count)
        for s in (first, last)
    )
    # Both prompt sets share the bytes.
    pairs, bytes_left = [], COMPARED // 2
    for i in range(count):
        bytes_left -= len(before[i].source) + len(after[i].source)
        if bytes_left < 0:
            break
        scores = [(n, float(old[n][i]), float(new[n][i])) for n in names]
        pairs.append(Pair(texts[i], before[i], after[i], scores))
    return pairs


def _cut(file: Path, in_strip: int, count: int) -> list[Shown]:
    """Return the first `count` pictures of a strip that has `in_strip` of them, made small."""
    with Image.open(file, formats=("PNG",)) as image:
        strip = image.convert("RGB")
    width = strip.width // in_strip
    boxes = [(i * width, 0, (i + 1) * width, strip.height) for i in range(count)]
    return [shown(_file(strip.crop(box))) for box in boxes]


def _file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    if max(image.size) <= UNCHANGED:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=82)
    return file.getvalue()
