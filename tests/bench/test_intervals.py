"""Intervals against what can be counted: order statistics, two units drawn twice, scipy's Wilson."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stepdistill.bench.intervals import ends, median, resampled_means, scaled, share, times_faster
from stepdistill.bench.rows import Value


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 7), (81, 263), (1, 1)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    from scipy.stats import binomtest

    found, wanted = share(right, n), binomtest(right, n).proportion_ci(0.95, "wilson")
    assert found.value == right / n and found.interval == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize(("right", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_a_share_of_what_is_not_there(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= right"):
        share(right, n)


def test_ranks_of_a_median_are_those_of_the_binomial() -> None:
    """The tables of every book: 2 and 9 of 10, 6 and 15 of 20, 40 and 61 of 100."""
    for n, ranks in ((6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))):
        values = [float(v) for v in range(1, n + 1)]
        found = median(values[::-1])
        assert found == Value((n + 1) / 2, ranks), n
        low = ranks[0]
        outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in (low, low + 1)]
        assert outside[0] <= 0.05 < outside[1]
    assert median([3.0, 1.0, 2.0, 5.0, 4.0]) == Value(3.0, None)


def test_scaling_turns_intervals_with_their_values() -> None:
    assert scaled(Value(2.0, (1.0, 4.0)), 8.0) == Value(16.0, (8.0, 32.0))
    assert scaled(Value(2.0, (1.0, 4.0)), 8.0, inverse=True) == Value(4.0, (2.0, 8.0))
    assert scaled(Value(2.0), 8.0) == Value(16.0) and scaled(Value(2.0), 8.0, inverse=True) == Value(4.0)


def test_times_faster_is_by_turns() -> None:
    """A machine that becomes slower for both changes nothing."""
    slow = [float(i) for i in range(1, 11)]
    assert times_faster([3 * s for s in slow], slow) == Value(3.0, (3.0, 3.0))


def test_two_units_drawn_twice() -> None:
    """All that can come out: the first twice, the second twice, both; tokens and not units have the same weight."""
    drawn = resampled_means(np.array([[2.0, 0.0], [4.0, 3.0]]), np.array([1, 3]), seed=0, resamples=4000)
    outcomes = {(2.0, 0.0): 0.25, (4 / 3, 1.0): 0.25, (1.5, 0.75): 0.5}
    for outcome, probability in outcomes.items():
        found = (np.abs(drawn - np.array(outcome)).max(1) < 1e-12).mean()
        assert abs(found - probability) < 4 * math.sqrt(0.25 / 4000), outcome
    np.testing.assert_array_equal(drawn, resampled_means(np.array([[2.0, 0.0], [4.0, 3.0]]), np.array([1, 3]), 0, 4000))
    assert not np.array_equal(drawn, resampled_means(np.array([[2.0, 0.0], [4.0, 3.0]]), np.array([1, 3]), 1, 4000))


def test_the_bootstraps_spread_is_the_means() -> None:
    values = np.random.default_rng(0).normal(size=400)
    drawn = resampled_means(values[:, None], np.ones(400), seed=0)[:, 0]
    assert drawn.std() == pytest.approx(values.std() / 20, rel=0.1)
    low, high = ends(drawn)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)
