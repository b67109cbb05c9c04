"""Image against image and prompt against prompt: how far a student is from its teacher, and whether two models differ at all.

Paired numbers need no large N: what prompts have in common, which is most of their spread, cancels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .features import Images, checked_images
from .metrics import bootstrap_interval, checked_features


def pixel_distances(images: Images, teacher: Images) -> Tensor:
    """Root mean square difference of each image from the teacher's of the same noise and prompt: [N] float64 in [0, 1].

    Args:
        images: uint8 [N, H, W, 3].
        teacher: as many, of the same size.

    Raises:
        InputError: sizes or numbers that differ.
        ValueError: not uint8 images.
    """
    images, teacher = checked_images(images), checked_images(teacher)
    if images.shape != teacher.shape:
        raise InputError(
            f"expected images of one number and size, got {_shape(images)} and the teacher's {_shape(teacher)}; "
            "sample both with the same prompts at the same resolution"
        )
    pairs = zip(images, teacher, strict=True)  # one at a time: as float64 a set takes 8 times its memory
    return torch.tensor([_rms(a.astype(np.int32) - b) for a, b in pairs], dtype=torch.float64)


def _rms(difference: np.ndarray) -> float:
    return math.sqrt(np.square(difference).mean(dtype=np.float64)) / 255


def _shape(images: Images) -> str:
    n, height, width, _ = images.shape
    return f"{n} of {width}x{height}"


def feature_distances(features: Tensor, teacher: Tensor) -> Tensor:
    """Euclidean distance of each image's features from those of the teacher's of the same noise and prompt: [N] float64.

    Args:
        features: [N, d].
        teacher: [N, d].

    Raises ValueError for unequal shapes, no images, nan or inf.
    """
    a, b = checked_features(features, teacher, least=1)
    if len(a) != len(b):
        raise ValueError(f"expected features of the same prompts, got {len(a)} and the teacher's {len(b)}")
    return (a - b).norm(dim=1)


class Difference(NamedTuple):
    """Mean of a - b over prompts and its 95 % bootstrap interval."""

    mean: float
    interval: tuple[float, float]


def paired_difference(values_a: Tensor, values_b: Tensor, seed: int, n: int = 1000) -> Difference:
    """How much larger one model's values are than another's on the same prompts; an interval that holds 0 says: not known.

    Args:
        values_a: [P], one a prompt: a distance, a hit, a score. Average several images of a prompt first.
        values_b: [P], of the same prompts in the same order.
        seed: of the bootstrap, which draws prompts again with both their values.
        n: resamples.

    Raises ValueError for unequal shapes, no prompts, nan or inf.
    """
    if values_a.shape != values_b.shape or values_a.ndim != 1 or not len(values_a):
        raise ValueError(
            f"expected two values [P] of the same prompts, got {tuple(values_a.shape)} and {tuple(values_b.shape)}"
        )
    differences = values_a.detach().to("cpu", torch.float64) - values_b.detach().to("cpu", torch.float64)
    if not torch.isfinite(differences).all():
        raise ValueError("expected finite values, got nan or inf; look at the images they were computed from")
    # prompts that are drawn in pairs are differences that are drawn
    interval = bootstrap_interval(lambda d: float(d.mean()), differences, n=n, seed=seed, paired=True)
    return Difference(float(differences.mean()), interval)


def indistinguishable(interval_a: tuple[float, float], interval_b: tuple[float, float]) -> bool:
    """Whether two intervals overlap, or touch: then neither model is ranked above the other.

    ValueError for an interval whose ends are nan or in the wrong order.
    """
    for low, high in (interval_a, interval_b):
        if not low <= high:
            raise ValueError(f"expected an interval (low, high), got ({low}, {high})")
    return max(interval_a[0], interval_b[0]) <= min(interval_a[1], interval_b[1])
