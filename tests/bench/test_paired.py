"""A student's images against its teacher's, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from stepdistill.bench.paired import (
    feature_distances,
    pixel_distances,
)
from stepdistill.errors import InputError


def filled(*levels: int, height: int = 4, width: int = 6) -> np.ndarray:
    """One image of a single level each."""
    images = np.empty((len(levels), height, width, 3), dtype=np.uint8)
    images[:] = np.array(levels)[:, None, None, None]
    return images


def test_pixel_distances_by_hand() -> None:
    ours, theirs = filled(0, 255, 10, 200), filled(255, 0, 10, 149)
    assert pixel_distances(ours, theirs).tolist() == [1.0, 1.0, 0.0, 0.2]  # no wrap-around of bytes either way
    assert pixel_distances(ours, theirs).dtype == torch.float64
    half = filled(0)
    half[0, :, :3] = 255  # half of the pixels, by all
    assert pixel_distances(half, filled(0)).tolist() == [math.sqrt(0.5)]
    channel = filled(0)
    channel[..., 1] = 51
    assert pixel_distances(channel, filled(0))[0] == pytest.approx(0.2 / math.sqrt(3), rel=1e-12)


def test_pixel_distances_by_the_definition() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (5, 8, 4, 3), dtype=np.uint8) for _ in range(2))
    expected = np.sqrt(((a / 255 - b / 255) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(pixel_distances(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(pixel_distances(b, a), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (filled(0, 9, width=8), InputError, "2 of 6x4 and the teacher's 2 of 8x4; sample both"),
        (filled(9), InputError, "2 of 6x4 and the teacher's 1 of 6x4"),
        (filled(0, 9).astype(np.float32), ValueError, "uint8"),
    ],
)
def test_images_that_are_no_pairs(other: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pixel_distances(filled(0, 9), other)


def test_feature_distances_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    b = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 0.0]])
    assert feature_distances(a, b).tolist() == [5.0, 0.0, 2.0]
    assert feature_distances(a.half(), b.half()).dtype == torch.float64
    assert feature_distances(a[:1], b[:1]).tolist() == [5.0]
    for bad, message in [
        (b[:2], "same prompts, got 3 and the teacher's 2"),
        (b[:, :1], "one dimension"),
        (b / 0, "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            feature_distances(a, bad)
    with pytest.raises(ValueError, match="at least 1 images"):
        feature_distances(a[:0], b[:0])
