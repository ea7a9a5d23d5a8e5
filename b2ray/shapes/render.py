"""Rendering of a caption as a 32 × 32 RGB picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from b2ray.shapes.captions import COLOURS, Caption, Thing

SIZE = 32
_SCALE = 4  # pictures are drawn four times as large and then averaged, for anti-aliased edges


@dataclass(frozen=True, slots=True)
class Placed:
    """An object with its centre and radius in pixels of the finished picture."""

    thing: Thing
    x: float
    y: float
    radius: float


def place(caption: Caption, rng: np.random.Generator) -> list[Placed]:
    """Draw random positions and sizes for the objects of a caption.

    The objects hardly ever touch, and their distance along the axis of the relation is larger than
    across it.

    Args:
        caption: the caption.
        rng: the generator of the jitter.
    """
    scene = caption.scene
    along = np.array([9.0, 23.0]) + rng.uniform(-1.0, 1.0, 2)
    across = 16.0 + rng.uniform(-3.5, 3.5) + rng.uniform(-1.5, 1.5, 2)
    radius = rng.uniform(4.5, 5.6, 2)
    xs, ys = (across, along) if scene.relation == "above" else (along, across)
    things = (scene.first, scene.second)
    return [
        Placed(thing, float(x), float(y), float(r))
        for thing, x, y, r in zip(things, xs, ys, radius, strict=True)
    ]


def draw(placed: Sequence[Placed], rng: np.random.Generator) -> np.ndarray:
    """Draw objects on a plain, nearly white background.

    Args:
        placed: the objects.
        rng: the generator for the shades of the colours.

    Returns:
        uint8 ``(32, 32, 3)``.
    """
    background = _shade((240, 240, 240), 8, rng)
    image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), background)
    pen = ImageDraw.Draw(image)
    for p in placed:
        colour = _shade(COLOURS[p.thing.colour], 8, rng)
        pen.polygon(outline(p.thing.shape, p.x * _SCALE, p.y * _SCALE, p.radius * _SCALE), colour)
    return np.asarray(image.reduce(_SCALE))


def render(caption: Caption, seed: int | Sequence[int]) -> np.ndarray:
    """Render a picture of the caption; the same seed gives the same bytes.

    Returns:
        uint8 ``(32, 32, 3)``.
    """
    rng = np.random.default_rng(seed)
    return draw(place(caption, rng), rng)


def render_batch(captions: Sequence[Caption], seed: int) -> np.ndarray:
    """Render a picture of each caption; picture ``i`` depends on ``(seed, i)`` and its caption.

    Returns:
        uint8 ``(N, 32, 32, 3)``.
    """
    pictures = np.empty((len(captions), SIZE, SIZE, 3), np.uint8)
    for i, caption in enumerate(captions):
        pictures[i] = render(caption, (seed, i))
    return pictures


def _shade(
    colour: tuple[int, int, int], spread: int, rng: np.random.Generator
) -> tuple[int, int, int]:
    """A random shade of a colour, each of whose channels differs by at most ``spread``."""
    r, g, b = np.clip(np.array(colour) + rng.integers(-spread, spread + 1, 3), 0, 255)
    return int(r), int(g), int(b)


# Corners relative to the centroid, in units of the radius, with y downwards. The factors give the
# shapes similar areas, so that the size does not reveal the shape.
_CIRCLE = [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 32, endpoint=False)]
_SQUARE = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
_TRIANGLE = [(0.0, -1.2), (1.15, 0.75), (-1.15, 0.75)]
_DIAMOND = [(0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)]
_A, _B = 0.38, 1.1
_CROSS = [
    (-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A),
    (_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A),
]  # fmt: skip

UNIT_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "circle": _CIRCLE,
    "square": _SQUARE,
    "triangle": _TRIANGLE,
    "diamond": _DIAMOND,
    "cross": _CROSS,
}


def outline(shape: str, x: float, y: float, radius: float) -> list[float]:
    """Corner coordinates ``[x0, y0, x1, y1, …]`` of a shape.

    Args:
        shape: one of `SHAPES`.
        x, y: the centroid in pixels.
        radius: the radius in pixels.
    """
    return [v for dx, dy in UNIT_POLYGONS[shape] for v in (x + dx * radius, y + dy * radius)]
