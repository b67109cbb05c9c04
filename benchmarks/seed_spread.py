"""Numbers over seeds: mean, spread, and whether a difference within each seed is larger than what seeds do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

CONFIDENCE = 0.95


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (of n - 1, None for one value) and the values; None for all where one isn't known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "std": None, "values": list(values)}
    return {"mean": mean(known), "std": stdev(known) if len(known) > 1 else None, "values": known}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """ours - theirs, seed by seed: its spread, Student's interval of the mean, and whether that leaves 0 out.

    One seed has no interval, and says nothing: None.
    """
    found = spread([a - b for a, b in zip(ours, theirs, strict=True)])
    if found["std"] is None:
        return {**found, "interval": None, "exceeds_seed_noise": None}
    half = t_quantile(len(ours) - 1) * found["std"] / math.sqrt(len(ours))
    interval = [found["mean"] - half, found["mean"] + half]
    return {**found, "interval": interval, "exceeds_seed_noise": interval[0] > 0.0 or interval[1] < 0.0}


def t_quantile(freedom: int, share: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = `share` under Student's distribution of so many degrees of freedom, by bisection."""
    low, high = 0.0, math.pi / 2  # theta = atan(t / sqrt(freedom)), in which the probability grows
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan theta): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sin, cos = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = cos if odd else 1.0, 0.0
    for k in range(freedom // 2):
        total += term
        # the next term has two more factors cos: times 2/3, 4/5, ... for odd, 1/2, 3/4, ... for even degrees
        term *= cos * cos * (2 * k + 2) / (2 * k + 3) if odd else cos * cos * (2 * k + 1) / (2 * k + 2)
    return 2.0 / math.pi * (theta + sin * total) if odd else sin * total
