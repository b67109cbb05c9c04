"""Image against image: how far a student's is from its teacher's of the same prompt and noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .features import Images, checked_images
from .metrics import checked_features


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
