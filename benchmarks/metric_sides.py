"""What benchmarks/metric_cost.py compares: the Frechet distance as stepdistill, torchmetrics and SciPy get to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.bench.moments import Moments, frechet_between

OURS, TORCHMETRICS, SCIPY = "ours", "torchmetrics", "scipy"


class Features(nn.Module):
    """The image network of torchmetrics' metric; the features are computed already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def metric(dim: int) -> Any:
    """torchmetrics', which keeps what it knows of the real side when it is reset."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(Features(dim), reset_real_features=False)


def drawn(n: int, dim: int, seed: int) -> Tensor:
    """Features [n, dim] float64, as extractors give them."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taker(side: str, dim: int) -> Callable[[Tensor], None]:
    """What takes in features batch by batch."""
    if side == OURS:
        return Moments(dim).update
    theirs = metric(dim)
    return lambda features: theirs.update(features, real=False)


def distances(reference: Tensor, batch: int) -> dict[str, Callable[[Tensor], float]]:
    """For each side the distance of features [N, d] to the moments of a reference [M, d], which are known before."""
    import numpy as np
    import scipy.linalg

    dim, other = reference.shape[1], reference.numpy()
    moments, theirs, mean, cov = Moments(dim), metric(dim), other.mean(0), np.cov(other, rowvar=False)
    moments.update(reference)
    theirs.update(reference, real=True)

    def ours(features: Tensor) -> float:
        found = Moments(dim)
        for part in features.split(batch):
            found.update(part)
        return frechet_between(moments, found)

    def torchmetrics(features: Tensor) -> float:
        theirs.reset()
        for part in features.split(batch):
            theirs.update(part, real=False)
        return float(theirs.compute())

    def root(features: Tensor) -> float:
        x = features.numpy()
        c = np.cov(x, rowvar=False)
        overlap = np.trace(scipy.linalg.sqrtm(c @ cov).real)
        return float(np.square(x.mean(0) - mean).sum() + np.trace(c) + np.trace(cov) - 2 * overlap)

    return {OURS: ours, TORCHMETRICS: torchmetrics, SCIPY: root}
