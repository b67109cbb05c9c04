"""Kernel distances of sets of images: unbiased squared MMDs, about 0 for one distribution at any number of images.

Both kernels are functions of the inner product of two feature vectors. All pairs count, in float64, and products are taken in
blocks, so that memory doesn't grow with the sets. Where a student draws few images well, these distances see little: read them
beside recall and diversity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .metrics import checked_features

_BLOCK = 1_000  # rows and columns of the kernel matrix in memory at a time
_SIGMA, _SCALE = 10.0, 1_000.0  # of CMMD


def kid(features_a: Tensor, features_b: Tensor) -> float:
    """The kernel distance of two feature sets [N, d] and [M, d] (KID, arXiv 1801.01401).

    The kernel is (x y / d + 1)^3. The estimate is over all pairs: torchmetrics averages it over subsets that it draws from the
    global generator. It can be negative. Raises ValueError for fewer than 2 images, unequal d, nan or inf.
    """
    a, b = checked_features(features_a, features_b)
    return _squared_mmd(a, b, lambda products: (products / a.shape[1] + 1).pow(3))


def cmmd(embeddings_a: Tensor, embeddings_b: Tensor) -> float:
    """The distance of two sets of CLIP embeddings [N, d] and [M, d], brought to unit norm here (CMMD, arXiv 2401.09603).

    1000 times the squared MMD with a Gaussian kernel of width 10. Unit vectors are at most 2 apart, so it is hardly more than
    10 |difference of their means|^2, and blind to all else. Unbiased, as the paper defines it: code that keeps the pairs of a
    point with itself adds about 10 (1/N + 1/M). It can be negative.

    Raises ValueError for an embedding of zeros, else as :func:`kid`.
    """
    a, b = (_unit(embeddings) for embeddings in checked_features(embeddings_a, embeddings_b))
    # for unit vectors |x - y|^2 = 2 - 2 x y; a constant cancels in the MMD, and the kernel less 1, at most 0.02, keeps digits
    return _SCALE * _squared_mmd(a, b, lambda products: ((products - 1) / _SIGMA**2).expm1())


def _unit(embeddings: Tensor) -> Tensor:
    norms = embeddings.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError("expected embeddings with a direction, got one of nothing but zeros; look at its image")
    return embeddings / norms


def _squared_mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """Unbiased; `kernel` maps inner products, element by element."""
    within = 0.0
    for x in (a, b):
        own = float(kernel(x.square().sum(1)).mean())  # a point with itself, which the mean over pairs leaves out
        within += (_mean(x, x, kernel) * len(x) - own) / (len(x) - 1)
    return within - 2 * _mean(a, b, kernel)


def _mean(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """Over all pairs."""
    sums = [kernel(p @ q.T).sum() for p in x.split(_BLOCK) for q in y.split(_BLOCK)]
    return float(torch.stack(sums).sum()) / (len(x) * len(y))
