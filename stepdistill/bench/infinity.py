"""The Frechet distance that infinitely many images would have, as far as those at hand can say (arXiv 1911.07023).

The distance of N images is too large by about c / N, with a c of its own for each model, so not even equal numbers make models
compare. A line through the distances of subsets, against 1 / N, ends at 1 / N = 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import generator
from .metrics import checked_features

SIZES = 15  # subsets, as in the paper
SMALLEST = 10  # the smallest of them has one in so many of the images
_STRAIGHT = 2  # images per dimension that the smallest subset needs


class Extrapolated(NamedTuple):
    """The end of the line.

    Attributes:
        value: the distance; below 0 where the true one is nearer to 0 than the noise.
        error: standard error of the fit. It tells of the subsets, not of the images that all of them come from, and is about
            half the error over fresh images: for that add the bootstrap's spread of the plain distance, in quadrature.
    """

    value: float
    error: float


def frechet_infinity(distance: Callable[[Tensor], float], features: Tensor, seed: int) -> Extrapolated:
    """The distance of features [N, d] to fixed moments, extrapolated to N = infinity.

    15 subsets without replacement, of sizes evenly spaced from N / 10 to N, and least squares over 1 / size (section 4). The
    bias of the fixed moments' own finite number of images stays.

    Args:
        distance: of features, as `metrics.frechet_to` gives it.
        features: [N, d]. Warns, once, for N < 20 d, where the subsets' distances bend and the value comes out too low.
        seed: the subsets are a function of it alone; no global generator is touched.

    Raises:
        InputError: N < 20.
        ValueError: nan or inf.
    """
    (features,) = checked_features(features, least=0)
    n, dim = features.shape
    if n < 2 * SMALLEST:
        raise InputError(f"expected at least {2 * SMALLEST} images to extrapolate, got {n}; raise --num_images")
    if n < SMALLEST * _STRAIGHT * dim:
        _warn_few(n, dim)
    sizes = np.linspace(n / SMALLEST, n, SIZES).round().astype(int)
    subsets = [generator(seed, "bench/infinity", int(size)).permutation(n)[:size] for size in sizes]
    return _end(1 / sizes, np.array([distance(features[torch.from_numpy(subset)]) for subset in subsets]))


def _end(x: np.ndarray, y: np.ndarray) -> Extrapolated:
    """Least squares' line at x = 0."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread
    value = float(y.mean() - slope * x.mean())
    residuals = y - value - slope * x
    variance = float(residuals @ residuals) / (len(x) - 2)
    return Extrapolated(value, float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread))))


@cache
def _warn_few(n: int, dim: int) -> None:
    warnings.warn(
        f"Frechet distance at infinity from {n} images in {dim} dimensions: fewer than {SMALLEST * _STRAIGHT} images per "
        "dimension, so it comes out too low",
        stacklevel=3,
    )
