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


def _radii(features: Tensor, k: int) -> Tensor:
    """[N] distance of each point to its k-th nearest neighbour, itself not counted."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in features.split(_BLOCK)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """[N] bool: which points lie in a ball around one of the centres, its surface included."""
    return torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in points.split(_BLOCK)])


def _sets(generated: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    generated, real = checked_features(generated, real)
    if not 1 <= k < min(len(generated), len(real)):
        raise InputError(
            f"expected 1 <= k < {min(len(generated), len(real))}, the number of images, got {k}; use more images"
        )
    return generated, real


def recall(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share of real images that a generated one could stand for (improved recall, arXiv 1904.06991, eq. 2).

    A real image counts if it lies in some generated image's ball, which reaches to that one's k-th nearest among the generated.

    Args:
        generated: [N, d].
        real: [M, d]. Recall rises with N and falls with M: compare at equal numbers only.
        k: neighbour that gives the radius.

    Raises InputError for k >= N or M, ValueError for nan, inf or unequal d.
    """
    generated, real = _sets(generated, real, k)
    return float(_inside(real, generated, _radii(generated, k)).double().mean())


def precision(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share of generated images that could be real: :func:`recall` with the sets exchanged (arXiv 1904.06991, eq. 1)."""
    return recall(real, generated, k)


def coverage(generated: Tensor, real: Tensor, k: int = 5) -> float:
    """Share of real images whose own ball, to the k-th nearest real one, holds a generated image (arXiv 2002.09797, eq. 4).

    Unlike recall it gains nothing from an outlier among the generated, whose ball is huge. Arguments and errors as `recall`.
    """
    generated, real = _sets(generated, real, k)
    radii = _radii(real, k)
    parts = zip(real.split(_BLOCK), radii.split(_BLOCK), strict=True)
    return float(torch.cat([torch.cdist(some, generated).min(1).values <= r for some, r in parts]).double().mean())


def prompt_diversities(features: Tensor) -> Tensor:
    """[P] mean Euclidean distance between two of the K images of each prompt; features [P, K, d], K >= 2, else ValueError."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(
            f"expected features [P, K, d] of K >= 2 images a prompt, got {tuple(features.shape)}; make more of each"
        )
    (flat,) = checked_features(features.reshape(-1, features.shape[2]))
    count = features.shape[1]
    first, second = torch.triu_indices(count, count, offset=1)
    sets = flat.reshape(features.shape)
    return (sets[:, first] - sets[:, second]).norm(dim=-1).mean(1)


def diversity(features: Tensor) -> float:
    """Mean over prompts of :func:`prompt_diversities`: 0 for a model that draws one image a prompt."""
    return float(prompt_diversities(features).mean())
