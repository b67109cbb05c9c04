"""Numbers about sets of images: Frechet distance, the floor it stands on, prompt accuracy, bootstrap intervals.

The Frechet distance of two feature sets is that of the Gaussians with their moments (arXiv 1706.08500). At a finite number of
images N it is biased upwards: two samples of *real* images are not 0 apart but a *floor* apart. So a distance is read against
its floor at the same N, and a ratio of distances is only stated where both stand well clear of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..randomness import generator

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

CLEAR = 5.0  # a ratio is stated only where both distances are this many standard deviations above their floor
ENOUGH = 10  # images per feature dimension, below which a covariance (and so the distance) is mostly noise


class _Identity(nn.Module):
    """Stands where torchmetrics expects an image network: the features are computed already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(dim: int) -> FrechetInceptionDistance:
    """torchmetrics' distance over ready-made float64 features.

    Its image path is not used: with `normalize=True` a custom network gets floats where the built-in one gets uint8, and the
    same images then give distances thousands of times apart. Here the extractor owns dtype and range, and torchmetrics
    owns the moments and the trace.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature=_Identity(dim), normalize=False)


def checked_features(*sets: Tensor) -> list[Tensor]:
    """Feature sets in float64 on the CPU, of one dimension, finite, with at least two images each."""
    for features in sets:
        if features.ndim != 2:
            raise ValueError(
                f"expected features [N, d], got shape {tuple(features.shape)}; flatten each image's features"
            )
        if len(features) < 2:
            raise ValueError(
                f"expected at least 2 images for a covariance, got {len(features)}; raise the number of images"
            )
        if not torch.isfinite(features).all():
            raise ValueError("expected finite features, got nan or inf; look at the images they were computed from")
    dims = {features.shape[1] for features in sets}
    if len(dims) > 1:
        raise ValueError(f"expected features of one dimension, got {sorted(dims)}; use one extractor for all sets")
    return [features.detach().to("cpu", torch.float64) for features in sets]


@cache
def _warn_small(n: int, dim: int) -> None:
    """Once for each pair: libraries reset the memory of `warnings`, so its own "once" would repeat for every row."""
    warnings.warn(
        f"Frechet distance of {n} images in {dim} dimensions: fewer than {ENOUGH} images per dimension, so it is mostly "
        "sampling noise; read it against the floor only",
        stacklevel=3,
    )


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The squared Frechet distance of two feature sets [N, d] and [M, d], by torchmetrics in float64.

    Warns, once, below 10 images per dimension. Raises ValueError for fewer than 2 images, unequal d, nan or inf.
    """
    a, b = checked_features(features_a, features_b)
    if min(len(a), len(b)) < ENOUGH * a.shape[1]:
        _warn_small(min(len(a), len(b)), a.shape[1])
    # The distance doesn't change under a common shift, and torchmetrics' uncentred sums lose fewer digits after one.
    centre = a.mean(0)
    metric = _metric(a.shape[1])
    metric.update(a - centre, real=True)
    metric.update(b - centre, real=False)
    return max(0.0, float(metric.compute()))  # equal sets come out as about -1e-12


def frechet_to(mean: Tensor, cov: Tensor) -> Callable[[Tensor], float]:
    """The squared Frechet distance of features [N, d] to fixed moments, quick enough to bootstrap.

    With S the root of the fixed covariance, tr (cov C)^(1/2) = tr (S C S)^(1/2), whose argument is symmetric.

    Args:
        mean: [d] float64.
        cov: [d, d] float64, unbiased.
    """
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = float(cov.trace())

    def distance(features: Tensor) -> float:
        c = features.T.cov().reshape(root.shape)
        overlap = torch.linalg.eigvalsh(root @ c @ root).clamp(min=0).sqrt().sum()
        return max(0.0, float((features.mean(0) - mean).square().sum() + trace + c.trace() - 2 * overlap))

    return distance


def kid(features_a: Tensor, features_b: Tensor) -> float:
    """The kernel distance of two feature sets [N, d] and [M, d] (KID, arXiv 1801.01401): about 0 for one distribution.

    The unbiased estimate of the squared MMD with the kernel (x y / d + 1)^3, from all pairs: torchmetrics averages it over
    subsets that it draws from the global generator. It can be negative. ValueError as `frechet_distance`.
    """
    a, b = checked_features(features_a, features_b)
    within = sum(_kernel_mean(x, x) * len(x) / (len(x) - 1) - _kernel_own(x) / (len(x) - 1) for x in (a, b))
    return float(within - 2 * _kernel_mean(a, b))


def _kernel_mean(x: Tensor, y: Tensor) -> float:
    """Mean of the kernel over all pairs, in blocks of both sets: memory doesn't grow with them."""
    sums = [(p @ q.T / x.shape[1] + 1).pow(3).sum() for p in x.split(1_000) for q in y.split(1_000)]
    return float(torch.stack(sums).sum()) / (len(x) * len(y))


def _kernel_own(x: Tensor) -> float:
    """Mean of the kernel of each point with itself."""
    return float((x.square().sum(1) / x.shape[1] + 1).pow(3).mean())


def is_clear(distance: float, floor: float, spread: float) -> bool:
    """Whether a distance stands far enough above its floor (5 x the floor's standard deviation) to be part of a ratio."""
    return distance - floor >= CLEAR * spread


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: Tensor,
    n: int,
    seed: int,
    paired: bool,
    centred: bool = False,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile interval of `statistic(*arrays)` when the images (first dimension) are drawn again with replacement.

    Args:
        statistic: takes as many arrays as are given, returns a number.
        arrays: [N_i, ...] each.
        n: number of resamples.
        seed: the resamples are a function of it alone; no global generator is touched.
        paired: draw the same indices from all arrays (rows that belong to one prompt stay together). They need one length.
        centred: shift the interval by (statistic - mean of the resampled statistic). For statistics with a small-sample bias:
            a resample holds only 63 % distinct images, so a Frechet distance of it is biased once more, and the plain
            interval can lie wholly above the distance it should hold.
        level: the share of resamples inside.

    Raises:
        ValueError: an empty array, n < 1, or paired arrays of unequal length.
    """
    lengths = [len(array) for array in arrays]
    if not lengths or min(lengths) < 1 or n < 1:
        raise ValueError(f"expected arrays with rows and n >= 1, got lengths {lengths} and n = {n}")
    if paired and len(set(lengths)) > 1:
        raise ValueError(
            f"expected paired arrays of one length, got {lengths}; use paired=False for independent samples"
        )
    values = np.empty(n)
    for i in range(n):
        draws = generator(seed, "bench/bootstrap", i)
        chosen = [draws.integers(length, size=length) for length in (lengths[:1] if paired else lengths)]
        indices = [torch.from_numpy(c) for c in (chosen * len(arrays) if paired else chosen)]
        values[i] = statistic(*(array[index] for array, index in zip(arrays, indices, strict=True)))
    shift = statistic(*arrays) - values.mean() if centred else 0.0
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) + shift
    return float(low), float(high)


def prompt_hits(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each attribute, and for "all" of them at once, which of N images show what their prompts asked for: bool [N].

    Args:
        logits: attribute -> [N, number of its values].
        labels: attribute -> [N] int64, the value asked for.

    Raises:
        ValueError: unequal attributes or lengths, an attribute called "all", no images, nan or inf.
    """
    if not logits or logits.keys() != labels.keys() or "all" in logits:
        raise ValueError(f"expected the same attributes, none called 'all', got {sorted(logits)} and {sorted(labels)}")
    hits = {}
    for name, scores in logits.items():
        if scores.ndim != 2 or labels[name].shape != scores.shape[:1] or not len(scores):
            raise ValueError(
                f"{name}: expected [N, K] and [N], got {tuple(scores.shape)} and {tuple(labels[name].shape)}"
            )
        if not torch.isfinite(scores).all():
            raise ValueError(f"{name}: expected finite logits, got nan or inf; look at the images")
        hits[name] = scores.argmax(1) == labels[name]
    return {**hits, "all": torch.stack(list(hits.values())).all(0)}


def prompt_accuracy(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of images with each attribute right, and under "all" with every one right; arguments as `prompt_hits`."""
    return {name: float(right.double().mean()) for name, right in prompt_hits(logits, labels).items()}
