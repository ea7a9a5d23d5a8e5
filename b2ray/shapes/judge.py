"""The exact judge, which decides whether a picture shows its caption.

Nothing in it is learned. Each pixel is explained as background mixed with one palette colour,
touching pixels of the same colour form an object, an object's shape is the template that it
overlaps most, and the relation follows from the two centroids. The judge is the held-out truth
against which learned rewards are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from b2ray.shapes.captions import COLOURS, SHAPES, Caption, Thing
from b2ray.shapes.render import SIZE, outline

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_MIN_AREA = 8  # pixels; smaller components are ignored
_MIN_OBJECT = 30  # pixels; a rendered object covers 45 to 100
_MAX_RESIDUAL = 60.0  # RGB distance beyond which no palette colour explains a pixel
_MIN_OVERLAP = 0.72  # with the template of a shape; less is no object
_GRID = 20  # resolution of the templates
_SPAN = 1.0  # distance from the centroid to the grid's edge, in square roots of the area


@dataclass(frozen=True, slots=True)
class Seen:
    """An object in a picture.

    Attributes:
        thing: its colour and shape.
        x, y: its centroid in pixels.
        overlap: overlap with the template of its shape, from 0 to 1.
    """

    thing: Thing
    x: float
    y: float
    overlap: float


class Judge:
    """Scores pictures for captions of the shapes world; a reward as `b2ray.rewards` defines it."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """1.0 for pictures that show their caption and nothing else, and 0.0 for all others.

        Args:
            images: uint8 ``(N, 32, 32, 3)``, RGB.
            prompts: N captions.

        Returns:
            float32 ``(N,)``.

        Raises:
            ValueError: wrong shape, dtype or number, or a prompt that is no caption.
        """
        captions = [Caption.parse(prompt) for prompt in prompts]
        scenes = self.see(images)
        if len(scenes) != len(captions):
            raise ValueError(f"The judge got {len(scenes)} pictures but {len(captions)} prompts.")
        pairs = zip(scenes, captions, strict=True)
        return np.array([_shows(seen, caption) for seen, caption in pairs], np.float32)

    def see(self, images: np.ndarray) -> list[list[Seen] | None]:
        """The objects of each picture, or None for pictures with something that is no object.

        Args:
            images: uint8 ``(N, 32, 32, 3)``, RGB.

        Raises:
            ValueError: the pictures have another shape or dtype.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(
                f"The judge reads uint8 pictures of shape (N, {SIZE}, {SIZE}, 3), "
                f"not {images.dtype} of shape {images.shape}."
            )
        if not len(images):
            return []
        classes, coverage = _explain(images)
        return _objects(classes, coverage)


def _shows(seen: list[Seen] | None, caption: Caption) -> bool:
    """Whether the objects of a picture are those of the caption, in its relation."""
    if seen is None or len(seen) != 2:
        return False
    return any(
        a.thing == caption.first
        and b.thing == caption.second
        and _relation(a.x - b.x, a.y - b.y) == caption.relation
        for a, b in (seen, seen[::-1])
    )


def _relation(dx: float, dy: float) -> str:
    """The position of ``(dx, dy)`` relative to the origin, with y downwards."""
    if abs(dy) > abs(dx):
        return "below" if dy > 0 else "above"
    return "right of" if dx > 0 else "left of"


def _explain(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain each pixel as background + coverage · (palette colour − background).

    Unlike the nearest palette colour, this is correct at anti-aliased edges, where blue mixed with
    white is closer to purple than to blue.

    Returns:
        The index of the palette colour, int64 ``(N, 32, 32)``, −1 for background and the palette's
        length for other colours; and the coverage, float32 ``(N, 32, 32)`` from 0 to 1.
    """
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    background = np.median(pixels, axis=1, keepdims=True)  # objects cover less than a quarter
    offset = pixels - background
    axis = _PALETTE[None] - background
    length = (axis**2).sum(2)
    dot = offset @ axis.swapaxes(1, 2)
    coverage = np.clip(dot / length[:, None], 0, 1)
    square = (offset**2).sum(2)[..., None]
    # |offset − coverage · axis|², expanded to avoid an array of (N, 1024, 6, 3)
    residual = square - 2 * coverage * dot + coverage**2 * length[:, None]
    best = residual.argmin(2)
    amount = np.take_along_axis(coverage, best[..., None], 2)[..., 0]
    error = np.take_along_axis(residual, best[..., None], 2)[..., 0]
    classes = np.where(amount >= 0.5, best, -1)
    classes = np.where(error > _MAX_RESIDUAL**2, len(_PALETTE), classes)
    shape = (len(images), SIZE, SIZE)
    return classes.reshape(shape), amount.reshape(shape)


def _components(classes: np.ndarray) -> np.ndarray:
    """Label the 4-connected components of equal class, for a whole batch at once.

    Every pixel starts with its own number, and the largest number of a component spreads over it.

    Returns:
        int64 ``(N, 32, 32)``, −1 for background.
    """
    labels = np.where(classes >= 0, np.arange(classes.size).reshape(classes.shape), -1)
    across = classes[:, :, 1:] == classes[:, :, :-1]
    down = classes[:, 1:] == classes[:, :-1]
    while True:
        before = labels.copy()
        for a, b, same in (
            (labels[:, :, 1:], labels[:, :, :-1], across),
            (labels[:, 1:], labels[:, :-1], down),
        ):
            np.copyto(a, np.maximum(a, b), where=same)
            np.copyto(b, np.maximum(a, b), where=same)
        if np.array_equal(before, labels):
            return labels


def _objects(classes: np.ndarray, coverage: np.ndarray) -> list[list[Seen] | None]:
    """The objects of each picture from its explained pixels; see `Judge.see`."""
    # Area, centroid, picture and class of each component.
    labels = _components(classes)
    inside = labels >= 0
    ids, member, area = np.unique(labels[inside], return_inverse=True, return_counts=True)
    picture, y, x = np.nonzero(inside)
    x_mean = np.bincount(member, x) / area
    y_mean = np.bincount(member, y) / area
    owner = np.zeros(len(ids), np.int64)
    owner[member] = picture
    kind = np.zeros(len(ids), np.int64)
    kind[member] = classes[inside]
    # A picture with a large component that is no object gets None.
    scenes: list[list[Seen] | None] = [[] for _ in range(len(classes))]
    names = list(COLOURS)
    large = np.nonzero(area >= _MIN_AREA)[0]
    overlap = _overlaps(labels, coverage, ids[large], owner[large])
    for row, i in enumerate(large):
        seen, best = scenes[owner[i]], int(overlap[row].argmax())
        plausible = kind[i] < len(names) and area[i] >= _MIN_OBJECT
        if seen is None or not plausible or overlap[row, best] < _MIN_OVERLAP:
            scenes[owner[i]] = None
            continue
        thing = Thing(names[kind[i]], SHAPES[best])
        seen.append(Seen(thing, float(x_mean[i]), float(y_mean[i]), float(overlap[row, best])))
    return scenes


def _overlaps(
    labels: np.ndarray, coverage: np.ndarray, ids: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """The overlap of components with the template of each shape.

    The overlap is the intersection of the coverages over their union. It does not depend on
    position and size, because a component is sampled around its centroid in units of the square
    root of its area.

    Args:
        labels, coverage: of all pictures, ``(N, 32, 32)``.
        ids: label of each component.
        owner: index of each component's picture.

    Returns:
        float32 ``(components, shapes)``.
    """
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    inside = padded[owner] == ids[:, None, None]
    near = inside.copy()  # the component and the pixels at its edge
    near[:, 1:] |= inside[:, :-1]
    near[:, :-1] |= inside[:, 1:]
    near[:, :, 1:] |= inside[:, :, :-1]
    near[:, :, :-1] |= inside[:, :, 1:]
    soft = np.where(near, np.pad(coverage, ((0, 0), (1, 1), (1, 1)))[owner], 0)
    patch = _patches(soft).reshape(len(ids), 1, _GRID**2)
    template = _TEMPLATES.reshape(1, len(SHAPES), _GRID**2)
    low, high = np.minimum(patch, template).sum(2), np.maximum(patch, template).sum(2)
    return (low / high).astype(np.float32)


def _patches(soft: np.ndarray) -> np.ndarray:
    """Sample coverages around their centroid, in units of the square root of their sum.

    Args:
        soft: coverages, float ``(M, 34, 34)``, with a margin of one pixel.

    Returns:
        float ``(M, 20, 20)``.
    """
    mass = np.maximum(soft.sum((1, 2)), 1e-6)
    rows = np.arange(SIZE + 2)
    cx = (soft.sum(1) * rows).sum(1) / mass
    cy = (soft.sum(2) * rows).sum(1) / mass
    reach = _SPAN * np.sqrt(mass)
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    gx = cx[:, None, None] + reach[:, None, None] * steps[None, None, :]
    gy = cy[:, None, None] + reach[:, None, None] * steps[None, :, None]
    return _bilinear(soft, gx, gy)


def _bilinear(soft: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of ``soft`` at the positions ``gx``, ``gy``."""
    last = SIZE + 1
    x0 = np.clip(np.floor(gx), 0, last - 1).astype(np.int64)
    y0 = np.clip(np.floor(gy), 0, last - 1).astype(np.int64)
    fx, fy = np.clip(gx - x0, 0, 1), np.clip(gy - y0, 0, 1)
    n = np.arange(len(soft))[:, None, None]
    top = soft[n, y0, x0] * (1 - fx) + soft[n, y0, x0 + 1] * fx
    bottom = soft[n, y0 + 1, x0] * (1 - fx) + soft[n, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _template(shape: str) -> np.ndarray:
    """A shape in the form of `_patches`, averaged over subpixel positions and over sizes."""
    fine, side = 8, SIZE + 2
    coverages = []
    shifts = (0.0, 0.25, 0.5, 0.75)
    for dx, dy, radius in itertools.product(shifts, shifts, (4.8, 5.4)):
        image = Image.new("L", (side * fine, side * fine), 0)
        points = outline(shape, (16 + dx) * fine, (16 + dy) * fine, radius * fine)
        ImageDraw.Draw(image).polygon(points, 255)
        coverages.append(np.asarray(image.reduce(fine), np.float32) / 255)
    return _patches(np.stack(coverages)).mean(0)


_TEMPLATES = np.stack([_template(shape) for shape in SHAPES])
