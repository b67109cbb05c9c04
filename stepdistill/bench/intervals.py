"""95 % intervals of shares, medians and ratios of means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..randomness import generator
from .rows import Value

Z = 1.959963984540054  # the normal's 97.5 % point
RESAMPLES = 1000
LEVEL = 0.95


def share(right: int, n: int) -> Value:
    """right / n with Wilson's score interval, which holds near 0 and 1 too (Brown, Cai and DasGupta 2001, equation 4)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"expected 0 <= right <= n and n >= 1, got {right} of {n}")
    p, grown = right / n, n + Z * Z
    centre = (right + Z * Z / 2) / grown
    half = Z * math.sqrt(n) / grown * math.sqrt(p * (1 - p) + Z * Z / (4 * n))
    return Value(p, (max(0.0, centre - half), min(1.0, centre + half)))


def median(values: Sequence[float]) -> Value:
    """The median with the interval between order statistics k and n + 1 - k, which needs no distribution.

    It holds the true median with 1 - 2 P(B < k), B ~ Binomial(n, 1/2), and k is the largest for which that is 95 % or
    more; none below 6 values, where even the ends hold it less often.
    """
    ordered = sorted(values)
    n, k, below = len(ordered), 0, 0.5 ** len(ordered)  # below = P(B <= k)
    while 1 - 2 * below >= LEVEL:
        k += 1
        below += math.comb(n, k) * 0.5**n
    middle = float(np.median(ordered))
    return Value(middle, None if k == 0 else (ordered[k - 1], ordered[n - k]))


def scaled(value: Value, factor: float, inverse: bool = False) -> Value:
    """factor x value, or factor / value, the interval with it."""
    low, high = value.interval or (value.value, value.value)
    ends = (factor / high, factor / low) if inverse else (factor * low, factor * high)
    return Value(factor / value.value if inverse else factor * value.value, None if value.interval is None else ends)


def times_faster(teacher: Sequence[float], student: Sequence[float]) -> Value:
    """The median over turns of the teacher's seconds over the student's, which were taken one after the other in each turn."""
    return median([theirs / ours for theirs, ours in zip(teacher, student, strict=True)])


def resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of [R] sets of units that are drawn again with replacement: float64 [R, K].

    Units are what may be thought independent (documents, images); the same are drawn for all columns, which makes
    differences of columns paired.

    Args:
        sums: of each unit, [U, K].
        counts: of the terms in it, [U].
        seed: of the draws.
    """
    draws = generator(seed, "bench", "units drawn again")
    found = np.empty((resamples, sums.shape[1]))
    for i in range(resamples):
        times = np.bincount(draws.integers(0, len(counts), len(counts)), minlength=len(counts))
        found[i] = (times[:, None] * sums).sum(0) / (times @ counts)
    return found


def ends(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values [R]."""
    low, high = np.percentile(samples, (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2))
    return float(low), float(high)
