"""Signed distances of the demo world's shapes and textures, and how much of a pixel lies inside them.

After https://iquilezles.org/articles/distfunctions2d/: negative inside, y down, edges one pixel wide when drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _outline(*half: tuple[float, float]) -> Callable[[Array, Array], Array]:
    """Signed distance to a polygon with mirror symmetry in x, given its right half from the axis back to the axis."""

    def distance(x: Array, y: Array) -> Array:
        x, squared, inside = np.abs(x), np.full_like(x, np.inf), np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in itertools.pairwise(half):
            ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
            squared = np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
            if ey:  # even-odd rule, with a ray to the right: does this edge cross it?
                inside ^= ((py < 0) != (y < by)) & (px < py * (ex / ey))
        return np.where(inside, -1.0, 1.0) * np.sqrt(squared)

    return distance


def _star(points: int = 5, inner: float = 0.48) -> Callable[[Array, Array], Array]:
    turns = [(1.0 if i % 2 == 0 else inner, math.pi * i / points) for i in range(points + 1)]
    return _outline(*((r * math.sin(a), -r * math.cos(a)) for r, a in turns))


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.92


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.74) - 0.22


_CROSS = ((0, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95), (0, 0.95))

# In units of the radius.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _outline((0, -0.82), (0.82, -0.82), (0.82, 0.82), (0, 0.82)),
    "triangle": _outline((0, -1), (0.91, 0.67), (0, 0.67)),
    "star": _star(),
    "cross": _outline(*_CROSS),
    "ring": _ring,
}


def cover(distance: Array) -> Array:
    """Share of each pixel inside, from the signed distance to the edge in pixels; exact for edges along x or y."""
    return np.clip(0.5 - distance, 0, 1)[..., None]


def wave(u: Array) -> Array:
    """Signed distance, in periods, to the bright half of a square wave of period 1."""
    return np.abs(u - np.floor(u) - 0.5) - 0.25


def _checks(u: Array, v: Array) -> Array:
    """Bright where one wave is and the other is not."""
    a, b = wave(u), wave(v)
    return np.maximum(np.minimum(a, b), -np.maximum(a, b))


# Signed distance, in periods, to the bright tone.
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "stripes": lambda u, v: wave(u),
    "checks": _checks,
    "dots": lambda u, v: np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5) - 0.3,
}
