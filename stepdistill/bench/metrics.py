"""Numbers about sets of images: Frechet distance, the floor it stands on, prompt accuracy, bootstrap intervals.

The Frechet distance of two feature sets is that of the Gaussians with their moments (arXiv 1706.08500). At a finite number of
images N it is biased upwards: two samples of *real* images are not 0 apart but a *floor* apart. So a distance is read against
its floor at the same N, and a ratio of distances is only stated where both stand well clear of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..randomness import generator

CLEAR = 5.0  # a ratio is stated only where both distances are this many standard deviations above their floor
ENOUGH = 10  # images per feature dimension, below which a covariance (and so the distance) is mostly noise


def checked_features(*sets: Tensor, least: int = 2) -> list[Tensor]:
    """Feature sets in float64 on the CPU, of one dimension, finite, with at least `least` images each; else ValueError."""
    for features in sets:
        if features.ndim != 2:
            raise ValueError(
                f"expected features [N, d], got shape {tuple(features.shape)}; flatten each image's features"
            )
        if len(features) < least:
            raise ValueError(f"expected at least {least} images, got {len(features)}; raise the number of images")
        if not torch.isfinite(features).all():
            raise ValueError("expected finite features, got nan or inf; look at the images they were computed from")
    dims = {features.shape[1] for features in sets}
    if len(dims) > 1:
        raise ValueError(f"expected features of one dimension, got {sorted(dims)}; use one extractor for all sets")
    return [features.detach().to("cpu", torch.float64) for features in sets]


@cache
def _warn_few(n: int, dim: int) -> None:
    """Once for each pair: libraries reset the memory of `warnings`, so its own "once" would repeat for every row."""
    warnings.warn(
        f"Frechet distance of {n} images in {dim} dimensions: fewer than {ENOUGH} images per dimension, so it is mostly "
        "sampling noise; read it against the floor only",
        stacklevel=4,
    )


def warn_if_few(n: int, dim: int) -> None:
    """Warns, once for each pair of numbers, below 10 images per dimension."""
    if n < ENOUGH * dim:
        _warn_few(n, dim)


def frechet_from(mean: Tensor, cov: Tensor) -> Callable[[Tensor, Tensor], float]:
    """The squared Frechet distance of other moments (mean [d], cov [d, d]) to these: one matrix root, many distances.

    With S the root of this covariance, tr (cov C)^(1/2) = tr (S C S)^(1/2), whose argument is symmetric. Ours, as torchmetrics
    takes features only, sums them uncentred and roots a product that isn't symmetric; it is the oracle of the tests.

    Args:
        mean: [d] float64.
        cov: [d, d] float64, unbiased.
    """
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = cov.trace()

    def distance(other: Tensor, c: Tensor) -> float:
        overlap = torch.linalg.eigvalsh(root @ c @ root).clamp(min=0).sqrt().sum()
        # equal moments come out as about -1e-12
        return max(0.0, float((other - mean).square().sum() + trace + c.trace() - 2 * overlap))

    return distance


def frechet_to(mean: Tensor, cov: Tensor) -> Callable[[Tensor], float]:
    """:func:`frechet_from` for features [N, d] float64, quick enough to bootstrap."""
    distance = frechet_from(mean, cov)
    return lambda features: distance(*_moments(features))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The squared Frechet distance of two feature sets [N, d] and [M, d], in float64 and with unbiased covariances.

    Warns, once, below 10 images per dimension. Raises ValueError for fewer than 2 images, unequal d, nan or inf.
    """
    a, b = checked_features(features_a, features_b)
    warn_if_few(min(len(a), len(b)), a.shape[1])
    return frechet_to(*_moments(a))(b)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and unbiased covariance [d, d], which torch gives without its dimensions for d = 1."""
    return features.mean(0), features.T.cov().reshape(features.shape[1], features.shape[1])


def is_clear(distance: float, floor: float, spread: float) -> bool:
    """Whether a distance stands far enough above its floor (5 x the floor's standard deviation) to be part of a ratio."""
    return distance - floor >= CLEAR * spread


def bootstrap_draws(
    statistic: Callable[..., float], *arrays: Tensor, n: int, seed: int, paired: bool
) -> NDArray[np.float64]:
    """[n] values of `statistic(*arrays)` with the images (first dimension) drawn again with replacement.

    Draw i takes the same places in all sets of one length, so two models' draws of the same prompts are pairs.
    Arguments and errors as :func:`bootstrap_interval`.
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
    return values


def interval_of(draws: NDArray[np.float64], centre: float | None = None, level: float = 0.95) -> tuple[float, float]:
    """Between which a share `level` of the draws lies; shifted so that their mean is `centre`, where one is given."""
    shift = 0.0 if centre is None else centre - draws.mean()
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) + shift
    return float(low), float(high)


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
    draws = bootstrap_draws(statistic, *arrays, n=n, seed=seed, paired=paired)
    return interval_of(draws, statistic(*arrays) if centred else None, level)


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
