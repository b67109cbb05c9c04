"""The demo world: captioned images of two objects on a textured ground, drawn by code, as many as you ask for.

Everything is a pure function of (seed, index). The attributes are independent and uniform and the captions name them
all, so what a generated image *should* show is known, and a small classifier can tell how often it does. As much is
left open: where the objects are, how large and how turned, and how the texture lies. The mean of all that a caption
allows is a blur, which is what a single step of a diffusion model draws, so this is a world in which few steps hurt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..randomness import generator
from . import shapes
from .shapes import Array

Phrases = dict[str, tuple[str, ...]]

TRAIN_SEED, REFERENCE_SEED, TEST_SEED = 101, 202, 303  # worlds that share no image; metrics compare with the second
EYE_SEED = 404  # and the one that the discriminator's eye is trained on

SHAPES: Phrases = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
}
COLOUR_NAMES: Phrases = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
}
PHRASES: dict[str, Phrases] = {  # attribute -> value -> the ways in which a caption names it
    "layout": {  # where the first object is, seen from the second; _MIRRORED has the same seen from the other
        "beside": ("left of", "to the left of"),
        "stacked": ("above", "over", "on top of"),
    },
    "first shape": SHAPES,
    "first colour": COLOUR_NAMES,
    "second shape": SHAPES,
    "second colour": COLOUR_NAMES,
    "ground": {
        "white": ("white",),
        "black": ("black",),
        "grey": ("grey", "gray"),
        "brown": ("brown",),
        "navy": ("navy",),
        "cream": ("cream", "beige"),
    },
    "texture": {
        "plain": ("a plain {} background", "plain {}"),
        "stripes": ("{} stripes", "a striped {} background"),
        "checks": ("{} checks", "a checkered {} background"),
        "dots": ("{} dots", "a dotted {} background"),
    },
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {name: tuple(values) for name, values in PHRASES.items()}

_MIRRORED = {"beside": ("right of", "to the right of"), "stacked": ("below", "under")}
_TEMPLATES = (  # the article is "a" before "orange" too
    "a {one} {relation} a {other} on {ground}",
    "on {ground}, a {one} {relation} a {other}",
    "{ground} with a {one} {relation} a {other}",
    "there is a {one} {relation} a {other}, on {ground}",
    "{one} {relation} {other}, {ground}",
)

# sRGB. An object's colour is 90 or more from every other colour, a texture's tones included: several times the jitter.
# Grounds, of which a picture shows but one, are 74 or more from each other.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 42),
    "orange": (240, 124, 18),
    "yellow": (246, 226, 40),
    "green": (40, 168, 62),
    "cyan": (40, 212, 226),
    "blue": (40, 92, 236),
    "purple": (142, 44, 196),
    "pink": (244, 116, 188),
    "white": (226, 226, 226),
    "black": (30, 30, 30),
    "grey": (128, 128, 128),
    "brown": (112, 70, 36),
    "navy": (28, 36, 104),
    "cream": (224, 202, 150),
}

# In pixels of a 64x64 image. The pair lies anywhere as long as it is whole: tilted, a triangle reaches 1.053 radii
# along x, at most 13.7 pixels, less than the largest radius and its margin. Only two of these side by side could touch.
RADIUS = (10.0, 13.0)
DISTANCE = (27.0, 31.0)  # of the two centres along the layout's axis
ASIDE = 5.0  # half-width of their offset across it
TILT = 15.0  # half-width of an object's rotation in degrees
MARGIN = 1.0
PERIODS = {"plain": (1.0, 1.0), "stripes": (10.0, 11.0), "checks": (17.0, 19.0), "dots": (11.0, 12.0)}
TURNS = {"plain": 0.0, "stripes": 45.0, "checks": 0.0, "dots": 0.0}  # of a texture, in degrees
SWAY = 8.0  # half-width of what is added to them
CONTRAST = 26.0  # of each of a texture's two tones from the ground's colour, in levels of 255
TINT, SHADE = 10.0, 5.0  # half-widths: each channel of an object, all channels of the ground together


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        shape, colour: values out of `ATTRIBUTES`.
        cx, cy, radius: its centre and size in pixels of a 64x64 image, y down.
        angle: clockwise, in degrees; 0 for circles and rings.
        tint: added to its RGB, in levels of 255.
    """

    shape: str
    colour: str
    cx: float
    cy: float
    radius: float
    angle: float = 0.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """One image, before it is drawn.

    Attributes:
        layout: "beside" (first is left of second) or "stacked" (first is above second).
        first, second: the objects.
        ground, texture: values out of `ATTRIBUTES`.
        shade: added to all three channels of the ground, in levels of 255.
        period: of the texture, in pixels of a 64x64 image.
        turn: of the texture, in degrees.
        phase: of the texture along its two axes, in periods.
    """

    layout: str
    first: Thing
    second: Thing
    ground: str
    texture: str
    shade: float = 0.0
    period: float = 1.0
    turn: float = 0.0
    phase: tuple[float, float] = (0.0, 0.0)


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world `seed`: independent uniform attributes, and all that captions leave open."""
    g = generator(int(seed), "world/scene", int(index))
    return _posed(g, tuple(v[g.integers(len(v))] for v in ATTRIBUTES.values()))


def variant(scene: Scene, seed: int, index: int, number: int) -> Scene:
    """Another scene of the same attributes, which every caption of scene number `index` fits as well."""
    return _posed(generator(int(seed), "world/variant", int(index), int(number)), values(scene))


def _posed(g: np.random.Generator, attributes: tuple[str, ...]) -> Scene:
    """A scene of these attributes, with all that captions leave open drawn from `g`."""
    layout, s1, c1, s2, c2, ground, texture = attributes
    r1, r2 = (float(g.uniform(*RADIUS)) for _ in range(2))
    gap, aside = float(g.uniform(*DISTANCE)), float(g.uniform(-ASIDE, ASIDE))
    dx, dy = (gap, aside) if layout == "beside" else (aside, gap)
    x1, y1 = (_place(g, d, r1, r2) for d in (dx, dy))
    places = ((s1, c1, x1, y1, r1), (s2, c2, x1 + dx, y1 + dy, r2))
    first, second = (Thing(s, c, x, y, r, _tilt(g, s), _tint(g)) for s, c, x, y, r in places)
    shade, period = float(g.uniform(-SHADE, SHADE)), float(g.uniform(*PERIODS[texture]))
    turn = TURNS[texture] + float(g.uniform(-SWAY, SWAY))
    return Scene(layout, first, second, ground, texture, shade, period, turn, (float(g.random()), float(g.random())))


def _place(g: np.random.Generator, d: float, r1: float, r2: float) -> float:
    """A coordinate of the first centre such that both objects, `d` apart, are whole."""
    low, high = max(r1, r2 - d) + MARGIN, 64 - MARGIN - max(r1, r2 + d)
    return float(g.uniform(low, high))


def _tilt(g: np.random.Generator, shape: str) -> float:
    angle = float(g.uniform(-TILT, TILT))
    return 0.0 if shape in ("circle", "ring") else angle


def _tint(g: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = (float(g.uniform(-TINT, TINT)) for _ in range(3))
    return red, green, blue


def values(scene: Scene) -> tuple[str, ...]:
    """The scene's attributes in the order of `ATTRIBUTES`."""
    one, two = scene.first, scene.second
    return scene.layout, one.shape, one.colour, two.shape, two.colour, scene.ground, scene.texture


def labels(scene: Scene) -> tuple[int, ...]:
    """Each attribute's index in its row of `ATTRIBUTES`."""
    return tuple(options.index(v) for options, v in zip(ATTRIBUTES.values(), values(scene), strict=True))


def caption(scene: Scene, seed: int, index: int) -> str:
    """A caption that names all attributes; template, synonyms and point of view are drawn from (seed, index)."""
    g = generator(int(seed), "world/caption", int(index))

    def pick(options: Sequence[str]) -> str:
        return options[int(g.integers(len(options)))]

    words = {name: pick(PHRASES[name][v]) for name, v in zip(ATTRIBUTES, values(scene), strict=True)}
    one, other = f"{words['first colour']} {words['first shape']}", f"{words['second colour']} {words['second shape']}"
    relation = words["layout"]
    if g.integers(2):
        one, other, relation = other, one, pick(_MIRRORED[scene.layout])
    ground = words["texture"].format(words["ground"])
    return pick(_TEMPLATES).format(one=one, other=other, relation=relation, ground=ground)


def tokens(text: str) -> list[str]:
    """A caption's words in order, a comma being a word of its own: the split that `vocabulary` is the alphabet of."""
    return text.lower().replace(",", " , ").split()


def vocabulary() -> tuple[str, ...]:
    """Every token that a caption can contain, sorted."""
    blank = dict.fromkeys(("one", "other", "relation", "ground"), "")
    texts = [template.format(**blank) for template in _TEMPLATES]
    texts += [p.format("") for phrases in PHRASES.values() for options in phrases.values() for p in options]
    texts += [p for options in _MIRRORED.values() for p in options]
    return tuple(sorted({token for text in texts for token in tokens(text)}))


def _texture(scene: Scene, x: Array, y: Array) -> Array:
    """Signed distance to the bright tone, in pixels of a 64x64 image."""
    cos, sin = math.cos(math.radians(scene.turn)), math.sin(math.radians(scene.turn))
    u = (cos * x + sin * y) / scene.period + scene.phase[0]
    v = (cos * y - sin * x) / scene.period + scene.phase[1]
    return shapes.TEXTURES[scene.texture](u, v) * scene.period


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """The image of a scene, uint8 [resolution, resolution, 3]: ground, texture, first and second object."""
    scale = resolution / 64
    axis = (np.arange(resolution) + 0.5) / scale  # pixel centres
    x, y = np.meshgrid(axis, axis)
    image = np.broadcast_to(np.add(COLOURS[scene.ground], scene.shade), (*x.shape, 3))
    if scene.texture != "plain":
        image = image + CONTRAST * (2 * shapes.cover(_texture(scene, x, y) * scale) - 1)
    for thing in (scene.first, scene.second):
        cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        u, v = (x - thing.cx) / thing.radius, (y - thing.cy) / thing.radius
        distance = shapes.SHAPES[thing.shape](cos * u + sin * v, cos * v - sin * u)
        cover = shapes.cover(distance * thing.radius * scale)
        image = image + cover * (np.add(COLOURS[thing.colour], thing.tint) - image)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class World:
    """An unlimited data set: the images, captions and labels of one seed."""

    seed: int
    resolution: int = 64

    def _scenes(self, indices: Iterable[int]) -> list[Scene]:
        return [scene(self.seed, i) for i in indices]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, 3, resolution, resolution] float32 in [-1, 1]."""
        return self._drawn(self._scenes(indices))

    def variants(self, indices: Sequence[int], count: int) -> Tensor:
        """[B * count, 3, resolution, resolution] float32 in [-1, 1]: `count` other images of each caption in turn."""
        scenes = zip(indices, self._scenes(indices), strict=True)
        return self._drawn([variant(s, self.seed, i, number) for i, s in scenes for number in range(count)])

    def _drawn(self, scenes: Iterable[Scene]) -> Tensor:
        images = np.stack([render(s, self.resolution) for s in scenes])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()

    def captions(self, indices: Sequence[int]) -> list[str]:
        """One caption an image."""
        return [caption(scene(self.seed, i), self.seed, i) for i in indices]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """[B, 7] int64, columns in the order of `ATTRIBUTES`."""
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
