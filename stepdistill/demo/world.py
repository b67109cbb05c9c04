"""The demo world: captioned images of one object on a background, drawn by code, as many as you ask for.

Everything is a pure function of (seed, index). The five attributes are independent and uniform and the captions name
them all, so what a generated image *should* show is known, and a small classifier can tell how often it does. Jitter in
place, size, rotation and colour makes every image a different one.

Shapes are signed distance functions (after https://iquilezles.org/articles/distfunctions2d/); edges are one pixel wide.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..randomness import generator

Array = NDArray[np.float64]
Phrases = dict[str, tuple[str, ...]]

TRAIN_SEED, REFERENCE_SEED, TEST_SEED = 101, 202, 303  # worlds that share no image; metrics compare with the second

PHRASES: dict[str, Phrases] = {  # attribute -> value -> the ways in which a caption names it
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square",),
        "triangle": ("triangle",),
        "star": ("star",),
        "heart": ("heart",),
        "cross": ("cross", "plus"),
        "ring": ("ring", "hoop"),
        "diamond": ("diamond", "rhombus"),
    },
    "colour": {
        "red": ("red",),
        "orange": ("orange",),
        "yellow": ("yellow",),
        "green": ("green",),
        "cyan": ("cyan", "turquoise"),
        "blue": ("blue",),
        "purple": ("purple", "violet"),
        "pink": ("pink",),
    },
    "background": {
        "white": ("white",),
        "black": ("black",),
        "grey": ("grey", "gray"),
        "brown": ("brown",),
        "navy": ("navy",),
        "cream": ("cream", "beige"),
    },
    "size": {
        "small": ("small", "little", "tiny"),
        "medium": ("medium", "medium sized"),
        "large": ("large", "big"),
    },
    "position": {
        "left": ("on the left", "at the left"),
        "right": ("on the right", "at the right"),
        "top": ("at the top", "near the top"),
        "bottom": ("at the bottom", "near the bottom"),
        "centre": ("in the middle", "at the centre", "in the center"),
    },
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {name: tuple(values) for name, values in PHRASES.items()}

_TEMPLATES = (
    "a {size} {colour} {shape} {position} of a {background} background",
    "a {size} {colour} {shape} on a {background} background, {position}",
    "on a {background} background, a {size} {colour} {shape} {position}",
    "{position} of a {background} background there is a {size} {colour} {shape}",
    "a {background} picture with a {size} {colour} {shape} {position}",
    "a {shape} {position} of a {background} background, {size} and {colour}",
    "{size} {colour} {shape}, {position}, {background} background",
)

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, no two closer than 90: several times the jitter
    "red": (222, 30, 42),
    "orange": (240, 124, 18),
    "yellow": (246, 226, 40),
    "green": (40, 168, 62),
    "cyan": (40, 212, 226),
    "blue": (40, 92, 236),
    "purple": (142, 44, 196),
    "pink": (244, 116, 188),
    "white": (246, 246, 246),
    "black": (12, 12, 12),
    "grey": (128, 128, 128),
    "brown": (112, 70, 36),
    "navy": (20, 28, 100),
    "cream": (236, 214, 160),
}

# In pixels of a 64x64 image, from its centre, y down. An object reaches no further than its radius along x and y, so
# the tightest case (large) still leaves one pixel of background: 9 + 1 + 21 = 31 of 32.
RADII = {"small": (8.5, 10.0), "medium": (13.5, 15.0), "large": (19.5, 21.0)}
OFFSETS = {"small": 18.0, "medium": 14.0, "large": 9.0}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
SHIFT, TILT = 1.0, 8.0  # half-widths of the jitter: pixels, degrees
TINT, SHADE = 10.0, 5.0  # and levels of 255: each channel of the object, all channels of the background together


@dataclass(frozen=True)
class Scene:
    """One image, before it is drawn.

    Attributes:
        shape, colour, background, size, position: values out of `ATTRIBUTES`.
        cx, cy, radius: the object's centre and reach in pixels of a 64x64 image.
        angle: rotation in degrees; 0 for circles and rings.
        tint: added to the object's RGB, in levels of 255.
        shade: added to all three channels of the background.
    """

    shape: str
    colour: str
    background: str
    size: str
    position: str
    cx: float
    cy: float
    radius: float
    angle: float = 0.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shade: float = 0.0


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world `seed`: five independent uniform attributes and the jitter."""
    g = generator(int(seed), "world/scene", int(index))
    shape, colour, background, size, position = (values[g.integers(len(values))] for values in ATTRIBUTES.values())
    radius = float(g.uniform(*RADII[size]))
    cx, cy = (32 + OFFSETS[size] * d + float(g.uniform(-SHIFT, SHIFT)) for d in DIRECTIONS[position])
    angle = float(g.uniform(-TILT, TILT))
    red, green, blue, shade = (float(g.uniform(-half, half)) for half in (TINT, TINT, TINT, SHADE))
    angle = 0.0 if shape in ("circle", "ring") else angle
    return Scene(shape, colour, background, size, position, cx, cy, radius, angle, (red, green, blue), shade)


def labels(scene: Scene) -> tuple[int, ...]:
    """Each attribute's index in its row of `ATTRIBUTES`."""
    return tuple(values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items())


def caption(scene: Scene, seed: int, index: int) -> str:
    """A caption that names all five attributes; template and synonyms are drawn from (seed, index)."""
    g = generator(int(seed), "world/caption", int(index))
    choices = {name: PHRASES[name][getattr(scene, name)] for name in ATTRIBUTES}
    words = {name: options[g.integers(len(options))] for name, options in choices.items()}
    return _TEMPLATES[g.integers(len(_TEMPLATES))].format(**words)


def tokens(text: str) -> list[str]:
    """A caption's words in order, a comma being a word of its own: the split that `vocabulary` is the alphabet of."""
    return text.lower().replace(",", " , ").split()


def vocabulary() -> tuple[str, ...]:
    """Every token that a caption can contain, sorted."""
    blank = dict.fromkeys(ATTRIBUTES, "")
    texts = [template.format(**blank) for template in _TEMPLATES]
    texts += [phrase for values in PHRASES.values() for options in values.values() for phrase in options]
    return tuple(sorted({token for text in texts for token in tokens(text)}))


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


def _heart(x: Array, y: Array) -> Array:
    zoom = 1.56  # the textbook heart is 1.21 wide and 1.10 high, with its tip at the origin and y up
    x, y = np.abs(x) / zoom, 0.57 - y / zoom
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * np.maximum(x + y, 0)
    body = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - fold) ** 2 + (y - fold) ** 2)) * np.sign(x - y)
    return zoom * np.where(x + y > 1, lobe, body)


_CROSS = ((0, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95), (0, 0.95))

# In units of the radius. The reach along x and y stays within 1 at any tilt up to 8 degrees.
_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _outline((0, -0.82), (0.82, -0.82), (0.82, 0.82), (0, 0.82)),
    "triangle": _outline((0, -1), (0.91, 0.67), (0, 0.67)),
    "star": _star(),
    "heart": _heart,
    "cross": _outline(*_CROSS),
    "ring": _ring,
    "diamond": _outline((0, -1), (0.78, 0), (0, 1)),
}


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """The image of a scene, uint8 [resolution, resolution, 3]: the object laid over the background by its coverage."""
    axis = (np.arange(resolution) + 0.5) * (64 / resolution)  # pixel centres
    cos, sin = math.cos(math.radians(scene.angle)), math.sin(math.radians(scene.angle))
    x, y = (axis[None, :] - scene.cx) / scene.radius, (axis[:, None] - scene.cy) / scene.radius
    distance = _DISTANCES[scene.shape](cos * x + sin * y, cos * y - sin * x)
    coverage = np.clip(0.5 - distance * (scene.radius * resolution / 64), 0, 1)[..., None]  # exact for a straight edge
    front = np.clip(np.add(COLOURS[scene.colour], scene.tint), 0, 255)
    back = np.clip(np.add(COLOURS[scene.background], scene.shade), 0, 255)
    return np.rint(back + coverage * (front - back)).astype(np.uint8)


@dataclass(frozen=True)
class World:
    """An unlimited data set: the images, captions and labels of one seed."""

    seed: int
    resolution: int = 64

    def _scenes(self, indices: Iterable[int]) -> list[Scene]:
        return [scene(self.seed, i) for i in indices]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, 3, resolution, resolution] float32 in [-1, 1]."""
        images = np.stack([render(s, self.resolution) for s in self._scenes(indices)])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()

    def captions(self, indices: Sequence[int]) -> list[str]:
        """One caption an image."""
        return [caption(scene(self.seed, i), self.seed, i) for i in indices]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """[B, 5] int64, columns in the order of `ATTRIBUTES`."""
        return torch.tensor([labels(s) for s in self._scenes(indices)], dtype=torch.int64)

    def write_folder(self, path: str | os.PathLike[str], count: int) -> None:
        """Write images 0 .. count - 1 as PNGs with a metadata.jsonl (file_name, text): an image folder for `datasets`.

        Raises:
            FileExistsError: the folder holds something already; a leftover image would silently join the data set.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"expected a new or empty folder, got files in {folder}; choose another or delete it")
        lines = []
        for i, (s, text) in enumerate(zip(self._scenes(range(count)), self.captions(range(count)), strict=True)):
            name = f"{i:06d}.png"
            Image.fromarray(render(s, self.resolution)).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": text}))
        (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
