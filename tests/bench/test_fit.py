"""The line through seconds and evaluations, against sums done by hand and numpy's own solver."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stepdistill.bench.fit import Line, fit_line


def test_a_line_is_found_again() -> None:
    line = fit_line([1, 2, 4, 8, 50], [0.25 + 0.125 * n for n in (1, 2, 4, 8, 50)])
    assert line is not None and line.points == 5
    assert (line.fixed, line.per_evaluation) == pytest.approx((0.25, 0.125), rel=1e-12)
    assert line.r2 == pytest.approx(1.0, abs=1e-12)
    assert (line.fixed_error, line.per_evaluation_error) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert line.seconds(100) == pytest.approx(12.75)


def test_three_points_by_hand() -> None:
    # means 2 and 2, sum of squares 2, of products 1: b = 1/2, a = 1; residuals -1/2, 1, -1/2: variance 3/2 over one degree
    line = fit_line([1, 2, 3], [1, 3, 2])
    assert line is not None
    expected = (1.0, 0.5, math.sqrt(1.5 * (1 / 3 + 2)), math.sqrt(0.75), 0.25, 3)
    found = (line.fixed, line.per_evaluation, line.fixed_error, line.per_evaluation_error, line.r2, line.points)
    assert found == pytest.approx(expected, rel=1e-12)


def test_as_numpy_solves_it() -> None:
    draws = np.random.default_rng(0)
    x = np.repeat([1.0, 2.0, 4.0, 8.0], 5)
    t = 0.3 + 0.02 * x + 0.01 * draws.standard_normal(20)
    (b, a), covariance = np.polyfit(x, t, 1, cov=True)
    line = fit_line(list(x), list(t))
    assert line is not None
    assert (line.fixed, line.per_evaluation) == pytest.approx((a, b), rel=1e-9)
    errors = tuple(np.sqrt(np.diag(covariance))[::-1])
    assert (line.fixed_error, line.per_evaluation_error) == pytest.approx(errors, rel=1e-9)
    assert line.r2 == pytest.approx(np.corrcoef(x, t)[0, 1] ** 2, rel=1e-9)


def test_too_little_is_said_to_be() -> None:
    assert fit_line([4, 4, 4], [1.0, 2.0, 3.0]) is None
    assert fit_line([4], [1.0]) is None
    assert fit_line([], []) is None
    assert fit_line([1, 3], [2.0, 6.0]) == Line(0.0, 2.0, None, None, 1.0, 2)
    flat = fit_line([1, 2, 3], [0.1, 0.1, 0.1])
    assert flat is not None and flat.r2 is None
    assert flat.fixed == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("x", "t"), [([1, 2], [1.0]), ([1, 2], [1.0, math.nan]), ([1, math.inf], [1.0, 2.0]), ([[1, 2]], [[1.0, 2.0]])]
)
def test_bad_points(x: list[float], t: list[float]) -> None:
    with pytest.raises(ValueError, match="as many finite seconds"):
        fit_line(x, t)
