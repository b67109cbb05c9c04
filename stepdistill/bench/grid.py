"""Pictures side by side: a row a prompt, a column a configuration, the same initial noise along each row."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .features import Images, checked_images

GAP, FONT_SIZE, LEFT = 6, 15, 220  # pixels: between tiles, height of letters, the column of prompts
SMALL = 128  # tiles are enlarged by whole factors to at least this


def picture_grid(path: str | os.PathLike[str], columns: Mapping[str, Images], prompts: Sequence[str]) -> None:
    """Writes a PNG with a title over each column and each prompt beside its row.

    Args:
        path: the file; parent folders are made.
        columns: title -> uint8 [len(prompts), H, W, 3], all of one size. Tiles below 128 pixels are enlarged by a whole
            factor without smoothing, so that every pixel stays what it was.
        prompts: one a row.

    Raises ValueError for no columns, unequal numbers or unequal sizes.
    """
    sizes = {checked_images(images).shape for images in columns.values()}
    if len(sizes) != 1 or len(prompts) != next(iter(sizes))[0]:
        raise ValueError(f"expected one column or more with {len(prompts)} images of one size, got {sorted(sizes)}")
    _, height, width, _ = next(iter(sizes))
    factor = max(1, -(-SMALL // min(height, width)))
    tile_w, tile_h = width * factor, height * factor
    font = ImageFont.load_default(size=FONT_SIZE)
    line = FONT_SIZE + 4
    titles = [_wrapped(title, font, tile_w) for title in columns]
    top = line * max(len(title) for title in titles) + 2 * GAP
    canvas = Image.new("RGB", (LEFT + len(columns) * (tile_w + GAP), top + len(prompts) * (tile_h + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, (title, images) in enumerate(zip(titles, columns.values(), strict=True)):
        left = LEFT + x * (tile_w + GAP)
        for i, words in enumerate(title):
            draw.text((left + tile_w / 2, GAP + i * line), words, fill="black", font=font, anchor="ma")
        for y, image in enumerate(images):
            tile = Image.fromarray(np.ascontiguousarray(image)).resize((tile_w, tile_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top + y * (tile_h + GAP)))
    for y, prompt in enumerate(prompts):
        lines = _wrapped(prompt, font, LEFT - 2 * GAP)[: tile_h // line]
        start = top + y * (tile_h + GAP) + (tile_h - line * len(lines)) / 2
        for i, words in enumerate(lines):
            draw.text((GAP, start + i * line), words, fill="black", font=font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """The text in lines that fit the width, by the widest letters it could have."""
    letters = max(1, int(width / font.getlength("n")))
    return textwrap.wrap(text, letters) or [""]
