"""The captions of the embedded world: two coloured shapes and their relative position.

``a red circle above a blue square`` is one of 3 480 captions, which consist of an ordered pair of
different objects (of 30) and one of 4 relations. A mirrored caption (``a blue square below a red
circle``) describes the same scene, so there are 1 740 scenes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "black": (25, 25, 30),
}
"""Name → red, green and blue, from 0 to 255."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


@dataclass(frozen=True, slots=True)
class Thing:
    """An object, with a colour of `COLOURS` and a shape of `SHAPES`."""

    colour: str
    shape: str

    def __str__(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Caption:
    """Two different objects and the position of the first relative to the second."""

    first: Thing
    relation: str
    second: Thing

    @property
    def text(self) -> str:
        """The caption in words."""
        return f"{self.first} {self.relation} {self.second}"

    @property
    def scene(self) -> Caption:
        """The same scene with ``above`` or ``left of``, which is equal for mirrored captions."""
        if self.relation in ("above", "left of"):
            return self
        return Caption(self.second, OPPOSITE[self.relation], self.first)

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Parse a caption; case and spacing do not matter.

        Raises:
            ValueError: the text is not a caption of this world.
        """
        caption = _BY_TEXT.get(" ".join(text.lower().split()))
        if caption is None:
            raise ValueError(
                f"{text!r} is not a caption of the shapes world; "
                "it reads like 'a red circle above a blue square' with two different objects, "
                f"colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)} "
                f"and relations {', '.join(RELATIONS)}."
            )
        return caption


def all_captions() -> tuple[Caption, ...]:
    """All 3 480 captions, always in the same order."""
    return _ALL


def _enumerate() -> tuple[Caption, ...]:
    things = [Thing(c, s) for c in COLOURS for s in SHAPES]
    pairs = itertools.permutations(things, 2)
    return tuple(Caption(a, relation, b) for a, b in pairs for relation in RELATIONS)


_ALL = _enumerate()
_BY_TEXT = {caption.text: caption for caption in _ALL}


def near_misses(caption: Caption, rng: np.random.Generator) -> list[Caption]:
    """Five captions that each differ from ``caption`` in one respect and describe other scenes.

    In this order, they have the colours swapped, the shapes swapped, the relation reversed, one
    colour replaced and one shape replaced. If a swap changes nothing, an attribute is replaced
    instead.

    Args:
        caption: the caption that a picture shows.
        rng: the generator for replaced attributes.
    """
    a, b = caption.first, caption.second
    candidates = [
        replace(caption, first=replace(a, colour=b.colour), second=replace(b, colour=a.colour)),
        replace(caption, first=replace(a, shape=b.shape), second=replace(b, shape=a.shape)),
        replace(caption, relation=OPPOSITE[caption.relation]),
        _replaced(caption, "colour", rng),
        _replaced(caption, "shape", rng),
    ]
    out: list[Caption] = []
    for i, candidate in enumerate(candidates):
        while candidate.scene == caption.scene or candidate in out:
            candidate = _replaced(caption, "shape" if i % 2 else "colour", rng)
        out.append(candidate)
    return out


def _replaced(caption: Caption, attribute: str, rng: np.random.Generator) -> Caption:
    """The caption with another colour or shape of one object; the objects stay different."""
    values = list(COLOURS) if attribute == "colour" else list(SHAPES)
    side = ("first", "second")[rng.integers(2)]
    while True:
        thing = replace(getattr(caption, side), **{attribute: values[rng.integers(len(values))]})
        changed: Caption = replace(caption, **{side: thing})
        if changed != caption and changed.first != changed.second:
            return changed


def choose(count: int, seed: int, exclude: Iterable[Caption] = ()) -> list[Caption]:
    """Choose captions of different scenes with balanced colours, shapes and relations.

    The numbers of occurrences of any two colours, shapes or relations differ by at most one.

    Args:
        count: number of captions.
        seed: seed of the choice.
        exclude: captions whose scenes are not chosen.

    Raises:
        ValueError: no such choice was found.
    """
    rng = np.random.default_rng(seed)
    excluded = {caption.scene for caption in exclude}
    for _ in range(20_000):
        colours = _cycle(list(COLOURS), 2 * count, rng)
        shapes = _cycle(SHAPES, 2 * count, rng)
        things = [Thing(c, s) for c, s in zip(colours, shapes, strict=True)]
        relations = _cycle(RELATIONS, count, rng)
        chosen = [
            Caption(a, r, b)
            for a, r, b in zip(things[::2], relations, things[1::2], strict=True)
            if a != b
        ]
        scenes = {caption.scene for caption in chosen}
        if len(scenes) == count and not scenes & excluded:
            return chosen
    raise ValueError(f"No balanced choice of {count} different scenes was found; ask for fewer.")


def _cycle(values: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` shuffled values, whose numbers of occurrences differ by at most one."""
    order = rng.permutation(len(values))
    repeated = [values[order[i % len(values)]] for i in range(count)]
    return [repeated[i] for i in rng.permutation(count)]
