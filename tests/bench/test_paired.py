"""A student's images against its teacher's, and two models against one another: by hand, and what pairing is for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import gaussian
from torch import Tensor

from stepdistill.bench.paired import (
    feature_distances,
    indistinguishable,
    paired_difference,
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


def values(n: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return gaussian(n, 1, seed, mean, scale)[:, 0]


def test_a_difference_and_its_interval() -> None:
    a, b = values(400, 0, mean=1.0), values(400, 1)
    mean, (low, high) = paired_difference(a, b, seed=0, n=2000)
    half = 1.96 * float((a - b).std()) / 20
    assert mean == pytest.approx(float((a - b).mean()), rel=1e-12)
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))
    swapped = paired_difference(b, a, seed=0, n=2000)
    assert swapped.mean == -mean and swapped.interval == (pytest.approx(-high), pytest.approx(-low))


def test_what_prompts_have_in_common_cancels() -> None:
    """Prompts differ by far more than the models do: pairs show the difference, models one by one don't."""
    prompts = values(200, 0, scale=10.0)
    a, b = prompts + 0.2 + values(200, 1, scale=0.1), prompts + values(200, 2, scale=0.1)
    found = paired_difference(a, b, seed=0)
    assert found.interval[0] > 0.15 and found.interval[1] < 0.25
    shuffled = paired_difference(a, b[torch.randperm(200, generator=torch.Generator().manual_seed(0))], seed=0)
    assert shuffled.interval[0] < 0 < shuffled.interval[1]
    alone = [(float(x.mean()) - 1.4, float(x.mean()) + 1.4) for x in (a, b)]
    assert indistinguishable(*alone)


def test_equal_models_have_no_difference() -> None:
    a = values(50, 0)
    assert paired_difference(a, a.clone(), seed=0) == (0.0, (0.0, 0.0))
    hits = a > 0
    assert paired_difference(hits, hits, seed=0).mean == 0.0  # 0 and 1 are numbers too


def test_a_difference_is_a_function_of_the_seed() -> None:
    a, b = values(50, 0), values(50, 1)
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    assert paired_difference(a, b, seed=1).interval != paired_difference(a, b, seed=2).interval


@pytest.mark.slow
def test_the_interval_covers_the_difference() -> None:
    inside = 0
    for i in range(200):
        low, high = paired_difference(values(100, 2 * i, mean=0.3), values(100, 2 * i + 1), seed=i, n=300).interval
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), torch.zeros(4), "same prompts"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "same prompts"),
        (torch.zeros(0), torch.zeros(0), "same prompts"),
        (torch.tensor([1.0, math.nan]), torch.zeros(2), "finite"),
    ],
)
def test_values_that_are_no_pairs(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, seed=0)


def test_overlapping_intervals_are_indistinguishable() -> None:
    assert indistinguishable((0.0, 2.0), (1.0, 3.0)) and indistinguishable((1.0, 3.0), (0.0, 2.0))
    assert indistinguishable((0.0, 9.0), (4.0, 5.0)) and indistinguishable((4.0, 5.0), (0.0, 9.0))
    assert indistinguishable((0.0, 1.0), (1.0, 2.0)) and indistinguishable((1.0, 2.0), (0.0, 1.0))
    assert not indistinguishable((0.0, 1.0), (1.1, 2.0)) and not indistinguishable((1.1, 2.0), (0.0, 1.0))
    for bad in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)):
        for pair in (((0.0, 1.0), bad), (bad, (0.0, 1.0))):
            with pytest.raises(ValueError, match="expected an interval"):
                indistinguishable(*pair)
