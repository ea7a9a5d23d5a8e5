"""The exact judge: does a picture show its caption?

No learning: each pixel is explained as background mixed with one palette colour, pixels of one
colour that touch form an object, an object's shape is the template it overlaps best, and the
relation follows from the two centroids. The judge is the held-out truth that a learned reward is
measured against.
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
_MIN_AREA = 8  # pixels; smaller islands are specks, not objects
_MIN_OBJECT = 30  # pixels; a drawn object covers 45 to 100
_MAX_RESIDUAL = 60.0  # RGB distance beyond which no palette colour explains a pixel
_MIN_OVERLAP = 0.72
_GRID = 20  # template resolution
_SPAN = 1.0  # the grid reaches this many square roots of the area from the centroid


@dataclass(frozen=True, slots=True)
class Seen:
    """An object found in a picture; centroid in pixels, overlap from 0 to 1."""

    thing: Thing
    x: float
    y: float
    overlap: float


class Judge:
    """Scores pictures against captions of the shapes world."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """1.0 where the picture shows its caption and nothing else, 0.0 elsewhere.

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
        """The objects of each picture, or None where it holds something that is no object.

        Args:
            images: uint8 ``(N, 32, 32, 3)``, RGB.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(
                f"The judge reads uint8 pictures of shape (N, {SIZE}, {SIZE}, 3), "
                f"not {images.dtype} of shape {images.shape}."
            )
        if not len(images):
            return []
        classes, cover = _explain(images)
        return _objects(classes, cover)


def _shows(seen: list[Seen] | None, caption: Caption) -> bool:
    if seen is None or len(seen) != 2:
        return False
    return any(
        a.thing == caption.first
        and b.thing == caption.second
        and _relation(a.x - b.x, a.y - b.y) == caption.relation
        for a, b in (seen, seen[::-1])
    )


def _relation(dx: float, dy: float) -> str:
    """How something at ``(dx, dy)`` lies to the origin, y downwards."""
    if abs(dy) > abs(dx):
        return "below" if dy > 0 else "above"
    return "right of" if dx > 0 else "left of"


def _explain(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explains each pixel as background + coverage · (palette colour − background).

    Unlike the plain nearest colour this is right at anti-aliased edges, where blue mixed with
    white comes closer to purple than to blue.

    Returns:
        The palette index ``(N, 32, 32)`` int64, −1 for background, the palette's length for a
        colour that is not in it; and the coverage ``(N, 32, 32)`` float32 from 0 to 1.
    """
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    ground = np.median(pixels, axis=1, keepdims=True)  # objects cover less than a quarter
    offset = pixels - ground
    axis = _PALETTE[None] - ground
    length = (axis**2).sum(2)
    dot = offset @ axis.swapaxes(1, 2)
    cover = np.clip(dot / length[:, None], 0, 1)
    square = (offset**2).sum(2)[..., None]
    # |offset − cover · axis|², expanded to spare an (N, 1024, 6, 3) array
    residual = square - 2 * cover * dot + cover**2 * length[:, None]
    best = residual.argmin(2)
    amount = np.take_along_axis(cover, best[..., None], 2)[..., 0]
    worst = np.take_along_axis(residual, best[..., None], 2)[..., 0]
    classes = np.where(amount >= 0.5, best, -1)
    classes = np.where(worst > _MAX_RESIDUAL**2, len(_PALETTE), classes)
    shape = (len(images), SIZE, SIZE)
    return classes.reshape(shape), amount.reshape(shape)


def _components(classes: np.ndarray) -> np.ndarray:
    """Labels 4-connected pixels of equal class: ``(N, 32, 32)`` int64, −1 for background.

    The largest pixel number of a component spreads over it, for the whole batch at once.
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


def _objects(classes: np.ndarray, cover: np.ndarray) -> list[list[Seen] | None]:
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
    out: list[list[Seen] | None] = [[] for _ in range(len(classes))]
    names = list(COLOURS)
    big = np.nonzero(area >= _MIN_AREA)[0]
    overlap = _overlaps(labels, cover, ids[big], owner[big], x_mean[big], y_mean[big])
    for row, i in enumerate(big):
        seen, best = out[owner[i]], int(overlap[row].argmax())
        known = kind[i] < len(names) and area[i] >= _MIN_OBJECT
        if seen is None or not known or overlap[row, best] < _MIN_OVERLAP:
            out[owner[i]] = None
            continue
        thing = Thing(names[kind[i]], SHAPES[best])
        seen.append(Seen(thing, float(x_mean[i]), float(y_mean[i]), float(overlap[row, best])))
    return out


def _overlaps(
    labels: np.ndarray,
    cover: np.ndarray,
    ids: np.ndarray,
    owner: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Overlap (intersection over union of coverages) of components with each shape's template.

    Position and size are taken out: the component is sampled around its centroid in units of the
    square root of its area.

    Returns:
        float32 ``(components, shapes)``.
    """
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    own = padded[owner] == ids[:, None, None]
    near = own.copy()  # the component and the edge pixels around it
    near[:, 1:] |= own[:, :-1]
    near[:, :-1] |= own[:, 1:]
    near[:, :, 1:] |= own[:, :, :-1]
    near[:, :, :-1] |= own[:, :, 1:]
    soft = np.where(near, np.pad(cover, ((0, 0), (1, 1), (1, 1)))[owner], 0)
    patch = _patches(soft).reshape(len(ids), 1, _GRID**2)
    template = _TEMPLATES.reshape(1, len(SHAPES), _GRID**2)
    low, high = np.minimum(patch, template).sum(2), np.maximum(patch, template).sum(2)
    return (low / high).astype(np.float32)


def _patches(soft: np.ndarray) -> np.ndarray:
    """Samples coverages around their centroid, in units of the square root of their sum.

    Args:
        soft: float ``(M, 34, 34)``, pictures with a margin of one pixel.

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
    last = SIZE + 1
    x0 = np.clip(np.floor(gx), 0, last - 1).astype(np.int64)
    y0 = np.clip(np.floor(gy), 0, last - 1).astype(np.int64)
    fx, fy = np.clip(gx - x0, 0, 1), np.clip(gy - y0, 0, 1)
    n = np.arange(len(soft))[:, None, None]
    top = soft[n, y0, x0] * (1 - fx) + soft[n, y0, x0 + 1] * fx
    bottom = soft[n, y0 + 1, x0] * (1 - fx) + soft[n, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _template(shape: str) -> np.ndarray:
    """A shape as `_patches` sees it, averaged over positions between pixels and over sizes."""
    fine, side = 8, SIZE + 2
    drawn = []
    shifts = (0.0, 0.25, 0.5, 0.75)
    for dx, dy, radius in itertools.product(shifts, shifts, (4.8, 5.4)):
        image = Image.new("L", (side * fine, side * fine), 0)
        points = outline(shape, (16 + dx) * fine, (16 + dy) * fine, radius * fine)
        ImageDraw.Draw(image).polygon(points, 255)
        drawn.append(np.asarray(image.reduce(fine), np.float32) / 255)
    return _patches(np.stack(drawn)).mean(0)


_TEMPLATES = np.stack([_template(shape) for shape in SHAPES])
