"""From the bytes of an image file to squares of pixels in [-1, 1]."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..randomness import generator

# What Pillow raises on broken files, depending on format and place; UnidentifiedImageError is an OSError
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason."""


@dataclass(frozen=True)
class View:
    """Which square of the resized image is cut out.

    Attributes:
        down, across: its place in the room that there is, in [0, 1); 0.5 is the centre.
        flip: whether the image is mirrored before.
    """

    down: float = 0.5
    across: float = 0.5
    flip: bool = False


CENTRE = View()


def views(seed: int, index: int, count: int, center_crop: bool, random_flip: bool) -> list[View]:
    """The `count` views of image `index`; crops are uniform over all places, and every second view is mirrored."""
    coin = int(generator(seed, "flip", index).integers(2))
    found = []
    for variant in range(count):
        down, across = (0.5, 0.5) if center_crop else generator(seed, "crop", index, variant).random(2).tolist()
        found.append(View(down, across, random_flip and (coin + variant) % 2 == 1))
    return found


@dataclass(frozen=True)
class Picture:
    """One image, ready for the autoencoder.

    Attributes:
        pixels: [3, R, R] float32 in [-1, 1].
        original: (height, width) of the upright image before it was resized.
        crop: (top, left) of the square within the resized, and perhaps mirrored, image.
    """

    pixels: Tensor
    original: tuple[int, int]
    crop: tuple[int, int]


def load(data: bytes, resolution: int, wanted: Sequence[View] = (CENTRE,)) -> list[Picture]:
    """One square a view of the upright image on white, its shorter side resized to `resolution` (Lanczos, antialiased).

    Raises :class:`Unreadable`.
    """
    try:
        with _open(data) as file:
            image = rgb(ImageOps.exif_transpose(file))
    except BROKEN as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return [_cut(image, resolution, view, (height, width)) for view in wanted]


def _cut(image: Image.Image, resolution: int, view: View, original: tuple[int, int]) -> Picture:
    if view.flip:
        image = ImageOps.mirror(image)
    left, top = (
        math.floor(place * (room - resolution + 1))
        for place, room in zip((view.across, view.down), image.size, strict=True)
    )
    values = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    pixels = torch.from_numpy(values).permute(2, 0, 1).div(127.5).sub(1.0).contiguous()
    return Picture(pixels, original, (top, left))


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose own words are the address of the BytesIO
        raise OSError("of no known image format") from error


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: transparency laid on white, 16-bit levels divided by 257."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # Pillow's own conversion to 8 bit would clip everything above 255 to white
        levels = np.rint(np.asarray(image).astype(np.float64) / 257.0).clip(0, 255).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
