"""The Frechet distance at infinity: lines in closed form, the paper's subsets, Gaussians of known distance."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from gaussians import gaussian
from torch import Tensor

from stepdistill.bench.infinity import SIZES, frechet_infinity
from stepdistill.bench.metrics import frechet_to
from stepdistill.errors import InputError


def rows(n: int) -> Tensor:
    """Features that are their own indices."""
    return torch.arange(float(n), dtype=torch.float64)[:, None]


def test_a_line_is_followed_to_its_end() -> None:
    value, error = frechet_infinity(lambda x: 3.0 + 500.0 / len(x), rows(1000), seed=0)
    assert math.isclose(value, 3.0, rel_tol=1e-12)
    assert error < 1e-12
    below, _ = frechet_infinity(lambda x: 40.0 / len(x) - 0.01, rows(1000), seed=0)
    assert math.isclose(below, -0.01, rel_tol=1e-12)  # below 0 isn't cut off: the mean over models would be too high


def test_value_and_error_are_those_of_least_squares() -> None:
    seen: list[tuple[int, float]] = []

    def distance(features: Tensor) -> float:
        seen.append((len(features), 2.0 + 30.0 / len(features) + 0.01 * math.sin(len(seen))))
        return seen[-1][1]

    found = frechet_infinity(distance, rows(3000), seed=0)
    sizes, values = (np.array(column) for column in zip(*seen, strict=True))
    fit = scipy.stats.linregress(1 / sizes, values)
    assert math.isclose(found.value, fit.intercept, rel_tol=1e-10)
    assert math.isclose(found.error, fit.intercept_stderr, rel_tol=1e-10)


@pytest.mark.parametrize("n", [20, 155, 2000])
def test_subsets_are_the_papers(n: int) -> None:
    seen: list[Tensor] = []
    frechet_infinity(lambda x: float(seen.append(x[:, 0].long()) or len(x)), rows(n), seed=0)
    sizes = [len(subset) for subset in seen]
    assert len(sizes) == SIZES == 15 and sizes[0] == round(n / 10) and sizes[-1] == n
    assert np.abs(np.diff(sizes) - 0.9 * n / 14).max() <= 1  # evenly spaced, as far as integers go
    assert all(len(subset.unique()) == len(subset) for subset in seen)  # without replacement
    if n == 2000:  # random ones, not the first so many, and no subset of the next
        assert not torch.equal(seen[0].sort().values, torch.arange(200))
        assert not set(seen[0].tolist()) <= set(seen[1].tolist())


def test_subsets_are_a_function_of_the_seed() -> None:
    x, before = gaussian(100, 2, 0), (torch.get_rng_state(), np.random.get_state()[1].copy())

    def first(features: Tensor) -> float:
        return float(features[0, 0])

    found = frechet_infinity(first, x, seed=3)
    assert found == frechet_infinity(first, x, seed=3)
    assert found != frechet_infinity(first, x, seed=4)
    torch.testing.assert_close(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.1, 1.05)])
def test_gaussians_of_known_distance(mean: float, scale: float) -> None:
    """At N = 2000, d = 16: unbiased within its error over draws, where the plain distance is far off."""
    d, draws = 16, 30
    truth = d * (mean**2 + (scale - 1) ** 2)
    distance = frechet_to(torch.zeros(d).double(), torch.eye(d).double())
    samples = [gaussian(2000, d, seed, mean, scale) for seed in range(draws)]
    ours = np.array([frechet_infinity(distance, x, seed).value for seed, x in enumerate(samples)]) - truth
    plain = np.array([distance(x) for x in samples]) - truth
    assert abs(ours.mean()) < 3 * ours.std(ddof=1) / math.sqrt(draws)
    assert plain.mean() > 5 * plain.std(ddof=1) / math.sqrt(draws)
    assert np.abs(ours).mean() < 0.5 * np.abs(plain).mean()
    assert abs(ours.mean()) < 0.15 * plain.mean()


def test_error_with_the_bootstraps_spread_is_that_over_fresh_images() -> None:
    """The fit's own error is about half of it, as its documentation says: subsets share their images."""
    d, distance = 16, frechet_to(torch.zeros(16).double(), torch.eye(16).double())
    samples = [gaussian(2000, d, seed, 0.3, 1.2) for seed in range(40)]
    found = [frechet_infinity(distance, x, seed) for seed, x in enumerate(samples)]
    over_images = np.std([f.value for f in found], ddof=1)
    fit = np.mean([f.error for f in found])
    plain = np.std([distance(x) for x in samples], ddof=1)  # what the bootstrap estimates
    assert 0.3 < fit / over_images < 0.8
    assert 0.7 < math.hypot(fit, plain) / over_images < 1.3


def test_too_few_images() -> None:
    with pytest.raises(InputError, match="at least 20 images to extrapolate, got 19; raise --num_images"):
        frechet_infinity(lambda x: 0.0, rows(19), seed=0)
    with pytest.raises(ValueError, match="finite"):
        frechet_infinity(lambda x: 0.0, rows(20) / 0, seed=0)


def test_a_line_that_bends_is_named_once() -> None:
    with pytest.warns(UserWarning, match="from 79 images in 4 dimensions: fewer than 20 images per dimension"):
        frechet_infinity(lambda x: 0.0, gaussian(79, 4, 0), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_infinity(lambda x: 0.0, gaussian(79, 4, 1), seed=0)
        frechet_infinity(lambda x: 0.0, gaussian(80, 4, 0), seed=0)
