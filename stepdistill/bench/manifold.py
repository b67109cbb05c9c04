"""Variety, which distances to the mean hide: recall and precision of k-nearest-neighbour balls, and diversity within a prompt.

A student that draws two hundred images well and no others comes close to its teacher in mean and covariance; here it doesn't.
All of it is exact, deterministic and in float64; distances are taken in blocks, so memory stays small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .metrics import checked_features

_BLOCK = 1_000  # rows of the distance matrix in memory at a time


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[N, M] distances from differences: 0 for equal points, and equal pairs give equal bits wherever they stand.

    The default, by products, puts copies about 1e-7 apart and more for features far from 0, so copies and ties are decided by
    rounding.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int, name: str) -> Tensor:
    """[N] distance of each point to its k-th nearest neighbour, itself not counted."""
    if k < 1:
        raise ValueError(f"expected k >= 1, got {k}; the papers use 3 for recall and precision, 5 for coverage")
    if k >= len(features):
        raise InputError(
            f"expected more than k = {k} {name} images, got {len(features)}; use more images or a smaller k"
        )
    # a point is its own nearest neighbour, at distance 0, so the k-th other one is number k + 1
    return torch.cat(
        [_distances(part, features).topk(k + 1, largest=False).values[:, -1] for part in features.split(_BLOCK)]
    )


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points that lie in a ball around one of the centres, its surface included."""
    found = [(_distances(part, centres) <= radii).any(1) for part in points.split(_BLOCK)]
    return float(torch.cat(found).double().mean())


def recall(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share of real images that a generated one could stand for (improved recall, arXiv 1904.06991, section 2).

    A real image counts if it lies in some generated image's ball, which reaches to that one's k-th nearest among the generated.

    Args:
        generated: [N, d]. The value changes with N: compare at equal numbers, with what real images score at that number.
        real: [M, d]. More of them make the value more precise, not higher or lower.
        k: neighbour that gives the radius.

    Raises:
        InputError: k >= N.
        ValueError: k < 1, fewer than 2 images, unequal d, nan or inf.
    """
    generated, real = checked_features(generated, real)
    return _inside(real, generated, _radii(generated, k, "generated"))


def precision(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share of generated images that could be real: in some real image's ball, to its k-th nearest real one.

    :func:`recall` with the sets exchanged (arXiv 1904.06991, section 2): M gives the radii, and InputError is for k >= M.
    """
    generated, real = checked_features(generated, real)
    return _inside(generated, real, _radii(real, k, "real"))


def coverage(generated: Tensor, real: Tensor, k: int = 5) -> float:
    """Share of real images whose own ball, to the k-th nearest real one, holds a generated image (arXiv 2002.09797, section 3).

    Unlike recall it gains nothing from an outlier among the generated, whose ball is huge. It rises with N / M, so it compares
    at equal N and M only. Arguments and errors as :func:`precision`.
    """
    generated, real = checked_features(generated, real)
    radii = _radii(real, k, "real")
    parts = zip(real.split(_BLOCK), radii.split(_BLOCK), strict=True)
    found = [_distances(some, generated).amin(1) <= radius for some, radius in parts]
    return float(torch.cat(found).double().mean())


def prompt_diversities(features: Tensor) -> Tensor:
    """[P] mean Euclidean distance between two of the K images of each prompt.

    Args:
        features: [P, K, d].

    Raises ValueError for K < 2, no prompts, another shape, nan or inf.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(
            f"expected features [P, K, d] of K >= 2 images a prompt, got {tuple(features.shape)}; make more of each"
        )
    (flat,) = checked_features(features.flatten(0, 1))
    return torch.stack([torch.pdist(images).mean() for images in flat.split(features.shape[1])])


def diversity(features: Tensor) -> float:
    """Mean over prompts of :func:`prompt_diversities`: 0 for a model that draws one image a prompt."""
    return float(prompt_diversities(features).mean())
