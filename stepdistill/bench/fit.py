"""Seconds against network evaluations: t = a + b NFE, by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """A fitted line with its standard errors.

    Attributes:
        fixed: a in seconds, what a call costs before and after its evaluations (text, decoding, the rest).
        per_evaluation: b in seconds, what one more network evaluation costs.
        fixed_error, per_evaluation_error: standard errors in seconds; None for two points, which a line always meets.
        r2: share of the variance of the seconds that the line explains; None if they don't vary.
        points: how many were fitted.
    """

    fixed: float
    per_evaluation: float
    fixed_error: float | None
    per_evaluation_error: float | None
    r2: float | None
    points: int

    def seconds(self, evaluations: float) -> float:
        """What the line gives at a number of evaluations."""
        return self.fixed + self.per_evaluation * evaluations


def fit_line(evaluations: Sequence[float], seconds: Sequence[float]) -> Line | None:
    """Ordinary least squares over the cells of one model at one batch size; None for fewer than 2 distinct evaluations.

    Give one point a cell (its median), or all raw values for errors that know their scatter. The errors hold for scatter that
    is independent and of one size; repeats that share a disturbance make them too small.

    Args:
        evaluations: NFE of each point, counted.
        seconds: of each point, all of a call or all of an image.

    Raises ValueError for lengths that differ and for values that are not finite.
    """
    x, t = np.asarray(evaluations, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if x.ndim != 1 or x.shape != t.shape or not (np.isfinite(x).all() and np.isfinite(t).all()):
        raise ValueError(f"expected as many finite seconds as evaluations, got shapes {t.shape} and {x.shape}")
    if len(np.unique(x)) < 2:
        return None
    n, mean = len(x), x.mean()
    spread = ((x - mean) ** 2).sum()
    b = ((x - mean) * (t - t.mean())).sum() / spread
    a = t.mean() - b * mean
    residual, total = ((t - a - b * x) ** 2).sum(), ((t - t.mean()) ** 2).sum()
    variance = residual / (n - 2) if n > 2 else None
    return Line(
        fixed=float(a),
        per_evaluation=float(b),
        fixed_error=None if variance is None else float(np.sqrt(variance * (1 / n + mean**2 / spread))),
        per_evaluation_error=None if variance is None else float(np.sqrt(variance / spread)),
        r2=float(1 - residual / total) if np.ptp(t) > 0 else None,
        points=n,
    )
