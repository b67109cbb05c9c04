"""From the bytes of an image file to a square of pixels in [-1, 1]."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# What Pillow raises on broken files, depending on format and place; UnidentifiedImageError is an OSError
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Picture:
    """One image, ready for the autoencoder.

    Attributes:
        pixels: [3, R, R] float32 in [-1, 1].
        original: (height, width) of the upright image before it was resized.
        crop: (top, left) of the square within the resized image.
    """

    pixels: Tensor
    original: tuple[int, int]
    crop: tuple[int, int]


def check(data: bytes) -> None:
    """Raises one of `UNREADABLE` where header or checksums show a broken image; pixels are not decoded."""
    with _open(data) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown")
        image.verify()


def load(data: bytes, resolution: int) -> Picture:
    """The upright image on white, its shorter side resized to `resolution` (Lanczos, antialiased), the centre cut out."""
    with _open(data) as file:
        image = rgb(ImageOps.exif_transpose(file))
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    values = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    pixels = torch.from_numpy(values).permute(2, 0, 1).div(127.5).sub(1.0).contiguous()
    return Picture(pixels, (height, width), (top, left))


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose own words are the address of the BytesIO
        raise OSError("of no known image format") from error


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: transparency laid on white, 16-bit levels divided by 257."""
    if image.mode.startswith("I"):  # Pillow's own conversion to 8 bit would clip everything above 255 to white
        levels = np.rint(np.asarray(image).astype(np.float64) / 257.0).clip(0, 255).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
