"""Pictures inside the page: small files as data, as many as its size allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from b2ray import trees
from b2ray.report.record import SETS, Record
from b2ray.trees import PNG

# Bytes that pictures of each kind may have in the page, which shall stay under 3 MB.
COMPARED, BRANCHED = 1_000_000, 1_300_000
PAIRS = 12  # of each prompt set, at the most
SIDE = 192  # pixels of a compared picture's longer side, at the most


@dataclass(frozen=True)
class Shown:
    """A picture as the page has it.

    Attributes:
        source: a data: address.
        sharp: whether it is so small that its pixels are to be seen.
    """

    source: str
    width: int
    height: int

    @property
    def sharp(self) -> bool:
        """Whether it is so small that it is enlarged by whole pixels."""
        return max(self.width, self.height) <= trees.EXACT


@dataclass(frozen=True)
class Pair:
    """A seed before and after.

    Attributes:
        scores: (reward's name, before, after).
    """

    prompt: str
    before: Shown
    after: Shown
    scores: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Compared:
    """The pairs of one prompt set, and between which stages they are."""

    prompts: str
    title: str
    first: int
    last: int
    pairs: list[Pair]


@dataclass(frozen=True)
class ShownLeaf:
    """A leaf for the page."""

    picture: Shown
    leaf: trees.Leaf


@dataclass(frozen=True)
class ShownTree:
    """A group for the page."""

    tree: trees.Tree
    fork: Shown
    leaves: list[ShownLeaf]


def shown(content: bytes) -> Shown:
    """A PNG or JPEG file's content as the page has it.

    Raises:
        OSError: it is no picture.
    """
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        width, height = image.size
    kind = "png" if content.startswith(PNG) else "jpeg"
    data = base64.b64encode(content).decode()
    return Shown(f"data:image/{kind};base64,{data}", width, height)


def compared(record: Record) -> list[Compared]:
    """Pictures of the same seeds at the first and the last evaluation that kept some."""
    found = []
    for prompts, steps in record.evaluated.items():
        kept = [s for s in steps if _strip(record, s, prompts).is_file()]
        if len(kept) < 2:
            continue
        pairs = _pairs(record, prompts, kept[0], kept[-1])
        if pairs:
            found.append(Compared(prompts, SETS[prompts], kept[0], kept[-1], pairs))
    return found


def branched(record: Record) -> list[tuple[int, list[ShownTree]]]:
    """(stage, its trees) of as many stages as there is room for: the first, the last, and others
    at equal distances between them."""
    there = [s for s in trees.stages(record.folder.path) if s <= record.stage]
    if not there:
        return []
    one = sum(_size(tree) for tree in trees.load(record.folder.path, there[-1]))
    room = max(1, BRANCHED // max(1, one))
    found, left = [], BRANCHED
    # The last counts most: it has its place first.
    for stage in reversed(_spaced(there, room)):
        loaded = trees.load(record.folder.path, stage)
        left -= sum(map(_size, loaded))
        if left < 0:
            break
        found.append((stage, [_shown_tree(tree) for tree in loaded]))
    return found[::-1]


def _spaced(values: Sequence[int], count: int) -> list[int]:
    """At most so many of them, at equal distances, the last one included."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _size(tree: trees.Tree) -> int:
    """Bytes in the page."""
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
    pairs, left = [], COMPARED // 2
    for i in range(count):
        left -= len(before[i].source) + len(after[i].source)
        if left < 0:
            break
        scores = [(n, float(old[n][i]), float(new[n][i])) for n in names]
        pairs.append(Pair(texts[i], before[i], after[i], scores))
    return pairs


def _cut(file: Path, held: int, count: int) -> list[Shown]:
    """The first pictures of a strip of `held`, small."""
    with Image.open(file, formats=("PNG",)) as image:
        strip = image.convert("RGB")
    width = strip.width // held
    boxes = [(i * width, 0, (i + 1) * width, strip.height) for i in range(count)]
    return [shown(_file(strip.crop(box))) for box in boxes]


def _file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    if max(image.size) <= trees.EXACT:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=82)
    return file.getvalue()
