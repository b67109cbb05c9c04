"""The picture grid: every tile where it belongs, enlarged without smoothing, with words beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepdistill.bench.grid import GAP, LEFT, picture_grid


def flat(*levels: int, size: int = 64) -> np.ndarray:
    """Images of one grey each, with a single red pixel in the top left corner."""
    images = np.stack([np.full((size, size, 3), level, dtype=np.uint8) for level in levels])
    images[:, 0, 0] = (255, 0, 0)
    return images


def test_tiles_are_where_they_belong(tmp_path: Path) -> None:
    picture_grid(tmp_path / "new" / "grid.png", {"one": flat(10, 60), "two": flat(110, 160)}, ["first", "second"])
    with Image.open(tmp_path / "new" / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    tile, height = 128, pixels.shape[0]
    assert pixels.shape[1] == LEFT + 2 * (tile + GAP)
    top = height - 2 * (tile + GAP)
    for row, levels in enumerate([(10, 110), (60, 160)]):
        for column, level in enumerate(levels):
            y, x = top + row * (tile + GAP), LEFT + column * (tile + GAP)
            got = pixels[y : y + tile, x : x + tile]
            assert (got[:2, :2] == (255, 0, 0)).all()  # one pixel became 2 x 2, with sharp edges
            assert (got[2:, 2:] == level).all() and (got[:2, 2:] == level).all()
    assert (pixels[:, :LEFT].min(2) < 100).any(axis=1)[top : top + tile].any()  # the words of the first row
    assert (pixels[:top, LEFT:].min(2) < 100).any()  # and the titles


def test_titles_and_prompts_stay_in_their_place(tmp_path: Path) -> None:
    """Long words run into no tile and no neighbour."""
    prompt = "an exceedingly long prompt about a small turquoise rhombus " * 9
    picture_grid(tmp_path / "grid.png", {"a student with a long name, 4 steps": flat(200), "b": flat(200)}, [prompt])
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    assert (pixels[:, LEFT - 4 : LEFT] == 255).all()
    assert (pixels[:, LEFT + 128 : LEFT + 128 + GAP] == 255).all()
    top = pixels.shape[0] - 128 - GAP
    assert top < 90
    assert (pixels[:top, :LEFT] == 255).all()  # a prompt too long for its row is cut, not spread over its neighbours


def test_large_images_keep_their_size(tmp_path: Path) -> None:
    picture_grid(tmp_path / "grid.png", {"one": flat(10, size=200)}, ["first"])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width == LEFT + 200 + GAP


@pytest.mark.parametrize(
    ("columns", "prompts"),
    [
        ({}, ["a"]),
        ({"one": flat(1, 2)}, ["a"]),
        ({"one": flat(1, 2), "two": flat(1)}, ["a", "b"]),
        ({"one": flat(9), "two": flat(9, size=32)}, ["a"]),
    ],
)
def test_unequal_columns(tmp_path: Path, columns: dict[str, np.ndarray], prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="of one size"):
        picture_grid(tmp_path / "grid.png", columns, prompts)
    assert not (tmp_path / "grid.png").exists()
