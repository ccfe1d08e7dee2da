"""Draws a scene: anti-aliased coloured shapes over smooth blotches, curved strokes and grain.

S pixels of a side, n pixels of a side of one object's window, K strokes, G blotches of a side. Lengths
are in pixels inside this file and in units of the image's side outside it.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, cos, pi, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.14, 0.14),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.94, 0.88, 0.16),
    "green": (0.16, 0.66, 0.22),
    "cyan": (0.16, 0.80, 0.84),
    "blue": (0.15, 0.27, 0.86),
    "purple": (0.56, 0.18, 0.70),
    "white": (0.95, 0.95, 0.95),
}
"""Name -> red, green, blue in 0..1, before each object's own tint."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
REACH = 1.2
"""No shape goes further from its centre than this, in radii, at any angle."""


class Thing(NamedTuple):
    """One object of a scene."""

    colour: int
    """Index into COLOURS."""
    shape: int
    """Index into SHAPES."""
    size: int
    """Index into SIZES of `scenes`; the radius says how large it really is."""
    x: float
    """Centre, in 0..1 of the image, to the right."""
    y: float
    """Centre, in 0..1 of the image, down."""
    radius: float
    """In units of the image's side."""
    angle: float
    """Turn in radians."""
    tint: tuple[float, float, float]
    """Added to the colour."""


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(0.84, 0.84), (-0.84, 0.84), (-0.84, -0.84), (0.84, -0.84)],
    "triangle": [(1.15 * sin(2 * pi * i / 3), -1.15 * cos(2 * pi * i / 3)) for i in range(3)],
    "star": [
        ((1.18, 0.5)[i % 2] * sin(pi * i / 5), (-1.18, -0.5)[i % 2] * cos(pi * i / 5)) for i in range(10)
    ],
    "cross": [
        (x * cos(i * pi / 2) - y * sin(i * pi / 2), x * sin(i * pi / 2) + y * cos(i * pi / 2))
        for i in range(4)
        for x, y in ((1.05, -0.36), (1.05, 0.36), (0.36, 0.36))
    ],
}
"""Corners in radii, y down; circle and ring have none."""
_RING_HOLE = 0.52
_TABLE_SIDE = 384
_TABLE_SPAN = 3.0  # the tables know distances at -3..3 radii: past the corners of any window


def box(thing: Thing) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a thing in 0..1 of the image: exact extents of its outline."""
    outline = _OUTLINES.get(SHAPES[thing.shape])
    if outline is None:
        left = top = -thing.radius
        right = bottom = thing.radius
    else:
        c, s = cos(thing.angle) * thing.radius, sin(thing.angle) * thing.radius
        xs = [x * c - y * s for x, y in outline]
        ys = [x * s + y * c for x, y in outline]
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return thing.x + left, thing.y + top, thing.x + right, thing.y + bottom


@lru_cache(maxsize=1)
def _distances() -> Floats:
    """(6, side * side) signed distance to each shape's outline in radii, negative inside."""
    axis = (np.arange(_TABLE_SIDE, dtype=np.float64) + 0.5) * (2 * _TABLE_SPAN / _TABLE_SIDE) - _TABLE_SPAN
    x, y = axis[None, :], axis[:, None]
    tables: list[NDArray[np.float64]] = []
    for name in SHAPES:
        away = np.hypot(x, y)
        if name == "circle":
            tables.append(away - 1)
        elif name == "ring":
            tables.append(np.maximum(away - 1, _RING_HOLE - away))
        else:
            tables.append(_polygon_distance(x, y, outline=_OUTLINES[name]))
    return np.stack(tables).astype(np.float32).reshape(len(SHAPES), -1)


def _polygon_distance(
    x: NDArray[np.float64], y: NDArray[np.float64], *, outline: list[tuple[float, float]]
) -> NDArray[np.float64]:
    """Signed distance to a polygon: the nearest edge, and an even-odd count for the sign."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
    inside = np.zeros(nearest.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(outline, [*outline[1:], outline[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


class _Grid(NamedTuple):
    """What depends on the resolution alone."""

    centres: Floats
    """(S,) of the pixels, in pixels."""
    plane: Floats
    """(3, S * S) x, y and 1 of every pixel, in units of the image's side."""
    smooth: Floats
    """(S, G) weights that spread G blotches over S pixels, cosine-shaped."""


_BLOTCHES = 5
_STROKES = 3
NUMBERS = 3 * (1 + _BLOTCHES * _BLOTCHES) + 9 * _STROKES
"""Random numbers a background needs, at any resolution."""
_GRAIN = np.float32(0.09)
_PALETTE = tuple(COLOURS.values())


@lru_cache(maxsize=8)
def _grid(resolution: int) -> _Grid:
    centres = np.arange(resolution, dtype=np.float32) + np.float32(0.5)
    unit = centres / resolution
    plane = np.stack([np.tile(unit, resolution), np.repeat(unit, resolution), np.ones(resolution**2)])
    apart = np.clip(np.abs(unit[:, None] * (_BLOTCHES - 1) - np.arange(_BLOTCHES)), 0, 1)
    return _Grid(centres, plane.astype(np.float32), (0.5 + 0.5 * np.cos(pi * apart)).astype(np.float32))


def draw(
    things: tuple[Thing, ...], *, resolution: int, numbers: Floats, grain: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Render a scene.

    Args:
        things: the objects, later ones over earlier ones.
        resolution: S.
        numbers: (NUMBERS,) uniform in 0..1; they draw the background.
        grain: (S * S,) uniform bytes; they speckle everything.

    Returns:
        (3, S, S) uint8, red green blue.
    """
    canvas = _background(numbers, grid=_grid(resolution))
    image = canvas.reshape(3, resolution, resolution)
    for thing in things:
        _stamp(image, thing)
    speckle = grain.astype(np.float32)
    speckle *= _GRAIN
    canvas += speckle
    canvas.clip(0, 255, out=canvas)
    return image.astype(np.uint8)


def _background(numbers: Floats, *, grid: _Grid) -> Floats:
    """(3, S * S) in about 0..255: a muted ground, blotches on it, and K bent strokes."""
    blotches = 3 * _BLOTCHES * _BLOTCHES
    tones = numbers[:blotches].reshape(3, _BLOTCHES, _BLOTCHES) * 64
    tones += numbers[blotches : blotches + 3, None, None] * 80
    tones += 55
    strokes = numbers[blotches + 3 :].reshape(_STROKES, 9)
    canvas = (strokes[:, 6:].T * 220 - 110) @ _strokes(strokes[:, :6].tolist(), grid=grid)
    canvas += (grid.smooth @ (tones @ grid.smooth.T)).reshape(canvas.shape)
    return canvas


def _strokes(strokes: list[list[float]], *, grid: _Grid) -> Floats:
    """(K, S * S) opacity in 0..1 from K rows of uniform numbers: long ellipses, bent into a parabola."""
    rows: list[tuple[float, float, float]] = []
    for x, y, turn, _, length, width in strokes:
        c, s = cos(2 * pi * turn), sin(2 * pi * turn)
        for scale, cx, cy in ((1 / (0.1 + 0.24 * length), c, s), (1 / (0.009 + 0.016 * width), -s, c)):
            rows.append((cx * scale, cy * scale, -(x * cx + y * cy) * scale))
    bend = [[20 * stroke[3] - 10] for stroke in strokes]
    u, v = (np.array(rows[i::2], dtype=np.float32) @ grid.plane for i in range(2))
    u *= u
    v += u * np.array(bend, dtype=np.float32)
    v *= v
    v += u
    np.subtract(1, v, out=v)
    return v.clip(0, 1, out=v)


def _stamp(canvas: Floats, thing: Thing) -> None:
    """Blend one object into (3, S, S), through its window of n by n pixels."""
    side = canvas.shape[-1]
    radius = thing.radius * side
    n = min(side, ceil(2 * REACH * radius) + 2)
    left = min(max(int(thing.x * side - n / 2), 0), side - n)
    top = min(max(int(thing.y * side - n / 2), 0), side - n)
    centres = _grid(side).centres
    # Window pixels in the shape's own frame, in cells of the table: one complex number each, since a
    # turn and a scale are then one product.
    frame = complex(cos(thing.angle), -sin(thing.angle)) * (_TABLE_SIDE / (2 * _TABLE_SPAN) / radius)
    across = (centres[left : left + n] - thing.x * side) * frame
    down = (centres[top : top + n] - thing.y * side) * (frame * 1j) + complex(1, 1) * (_TABLE_SIDE / 2)
    place = across + down[:, None]
    cell = place.imag.astype(np.intp)
    cell *= _TABLE_SIDE
    cell += place.real.astype(np.intp)
    opacity = _distances()[thing.shape].take(cell, mode="clip")
    opacity *= -radius
    opacity += 0.5
    opacity.clip(0, 1, out=opacity)
    window = canvas[:, top : top + n, left : left + n]
    colour = _PALETTE[thing.colour]
    paint = [255 * (a + b) for a, b in zip(colour, thing.tint, strict=True)]
    change = np.array(paint, dtype=np.float32)[:, None, None] - window
    change *= opacity
    window += change
