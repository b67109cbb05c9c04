"""Features for tests of distances: samples of Gaussians, samples with exact moments, and what torchmetrics makes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gaussian(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + mean


def exact(mean: Tensor, cov: Tensor, n: int, seed: int) -> Tensor:
    """Features whose sample mean and (n - 1) covariance are the given ones to rounding."""
    x = gaussian(n, len(mean), seed)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return whitened @ torch.linalg.cholesky(cov).T + mean


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.T.cov().reshape(x.shape[1], x.shape[1])


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(d, d, seed))[0]


class Features(nn.Module):
    """Stands where torchmetrics expects an image network: the features are computed already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def torchmetrics_frechet(a: Tensor, b: Tensor) -> float:
    """Its sums aren't centred, so give it features near 0."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Features(a.shape[1]), normalize=False)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())
