"""Frechet distance against closed forms, torchmetrics and SciPy, its floor and small-N traps; accuracy; bootstrap intervals."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from gaussians import exact, gaussian, moments, rotation, torchmetrics_frechet
from torch import Tensor

from stepdistill.bench.metrics import (
    bootstrap_interval,
    frechet_distance,
    frechet_to,
    is_clear,
    prompt_accuracy,
    prompt_hits,
)


def test_common_axes_closed_form() -> None:
    q, d = rotation(6, 0), 6
    a, b = torch.linspace(0.2, 3, d).double(), torch.linspace(2, 0.5, d).double()
    shift = torch.linspace(-1, 1, d).double()
    truth = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    x = exact(torch.zeros(d).double(), q @ a.diag() @ q.T, 100, 1)
    y = exact(shift, q @ b.diag() @ q.T, 150, 2)
    assert math.isclose(frechet_distance(x, y), truth, rel_tol=1e-9)
    assert math.isclose(frechet_to(*moments(x))(y), truth, rel_tol=1e-9)


def test_any_axes_closed_form() -> None:
    """In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), also where A and B don't commute."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    product = a @ b
    truth = float(1 + a.trace() + b.trace() - 2 * (product.trace() + 2 * product.det().sqrt()).sqrt())
    x = exact(torch.zeros(2).double(), a, 50, 0)
    y = exact(torch.tensor([0.6, 0.8], dtype=torch.float64), b, 60, 1)
    assert math.isclose(frechet_distance(x, y), truth, rel_tol=1e-9)
    assert math.isclose(frechet_to(*moments(x))(y), truth, rel_tol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_any_range_of_features_is_kept(scale: float, offset: float) -> None:
    """No conversion to bytes, no float32 on the way: scaled features give the scaled distance, shifted ones the same."""
    x, y = gaussian(200, 4, 0), gaussian(200, 4, 1, mean=0.5)
    moved = frechet_distance(x * scale + offset, y * scale + offset)
    assert math.isclose(moved, scale**2 * frechet_distance(x, y), rel_tol=1e-7 if offset else 1e-12)


@pytest.mark.parametrize(("n", "d"), [(2000, 32), (400, 40), (30, 48)])
@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_three_ways_agree(n: int, d: int) -> None:
    """The symmetric form, torchmetrics and SciPy's matrix root, also with singular covariances (N < d)."""
    x, y = gaussian(n, d, 0), gaussian(n + 7, d, 1, mean=0.3, scale=1.2)
    ours = frechet_distance(x, y)
    assert frechet_to(*moments(x))(y) == ours
    assert math.isclose(frechet_distance(y, x), ours, rel_tol=1e-6)
    assert math.isclose(torchmetrics_frechet(x, y), ours, rel_tol=1e-6)
    if n > d:
        a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
        root = np.trace(scipy.linalg.sqrtm(a @ b).real)
        oracle = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b) - 2 * root
        assert math.isclose(ours, oracle, rel_tol=1e-6)


def test_half_precision_features_are_measured_in_double() -> None:
    x, y = gaussian(100, 4, 0).half(), gaussian(100, 4, 1).half()
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())


def test_a_set_is_at_zero_from_itself() -> None:
    x = gaussian(300, 16, 0)
    assert 0 <= frechet_distance(x, x) < 1e-8
    assert 0 <= frechet_to(*moments(x))(x) < 1e-8


def test_one_dimension() -> None:
    x, y = gaussian(50, 1, 0), gaussian(50, 1, 1, mean=2)
    truth = float((x.mean() - y.mean()).square() + (x.std() - y.std()).square())
    assert math.isclose(frechet_distance(x, y), truth, rel_tol=1e-9)
    assert math.isclose(frechet_to(*moments(x))(y), truth, rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_floor_falls_with_n() -> None:
    at = {n: frechet_distance(gaussian(n, 32, n), gaussian(n, 32, n + 1)) for n in (64, 512, 4096)}
    assert at[64] > 5 * at[512] > 25 * at[4096] > 0


def test_small_samples_warn() -> None:
    with pytest.warns(UserWarning, match="79 images in 8 dimensions"):
        frechet_distance(gaussian(79, 8, 0), gaussian(200, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(gaussian(79, 8, 2), gaussian(200, 8, 1))  # said already
        frechet_distance(gaussian(80, 8, 0), gaussian(200, 8, 1))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(9, 4), "at least 2 images"),
        (torch.zeros(9, 4), torch.zeros(0, 4), "at least 2 images"),
        (torch.zeros(9, 4), torch.zeros(9, 5), "one dimension"),
        (torch.zeros(9, 4), torch.full((9, 4), torch.nan), "finite"),
        (torch.zeros(9, 4, 1), torch.zeros(9, 4, 1), "shape"),
    ],
)
def test_bad_features(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


def test_clear_is_five_deviations_above_the_floor() -> None:
    assert is_clear(5.0, 1.0, 0.8) and not is_clear(4.99, 1.0, 0.8)
    assert not is_clear(0.5, 1.0, 0.8)


def mean(x: Tensor) -> float:
    return float(x.mean())


def test_interval_of_a_mean_is_the_known_one() -> None:
    x = gaussian(400, 1, 0)[:, 0]
    low, high = bootstrap_interval(mean, x, n=4000, seed=0, paired=False)
    half = 1.96 * float(x.std()) / math.sqrt(len(x))
    assert abs(low - (mean(x) - half)) < 0.08 * half
    assert abs(high - (mean(x) + half)) < 0.08 * half


def test_pairing_keeps_rows_together() -> None:
    x = gaussian(200, 1, 0)[:, 0]
    y = x + 1 + 0.01 * gaussian(200, 1, 1)[:, 0]

    def gain(a: Tensor, b: Tensor) -> float:
        return mean(b) - mean(a)

    low, high = bootstrap_interval(gain, x, y, n=200, seed=0, paired=True)
    wide_low, wide_high = bootstrap_interval(gain, x, y, n=200, seed=0, paired=False)
    assert 0.99 < low < high < 1.01
    assert wide_high - wide_low > 20 * (high - low)
    with pytest.raises(ValueError, match="one length"):
        bootstrap_interval(gain, x, y[:-1], n=10, seed=0, paired=True)
    bootstrap_interval(gain, x, y[:-1], n=10, seed=0, paired=False)


def test_intervals_are_a_function_of_the_seed() -> None:
    x = gaussian(50, 1, 0)[:, 0]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = bootstrap_interval(mean, x, n=50, seed=3, paired=True)
    assert first == bootstrap_interval(mean, x, n=50, seed=3, paired=True)
    assert first != bootstrap_interval(mean, x, n=50, seed=4, paired=True)
    torch.testing.assert_close(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_centred_interval_holds_the_distance_that_the_plain_one_misses() -> None:
    """A resample has fewer distinct images, so its distance is biased once more, near the floor by more than its spread."""
    distance, x = frechet_to(*moments(gaussian(2000, 16, 0))), gaussian(200, 16, 1)
    plain = bootstrap_interval(distance, x, n=100, seed=0, paired=True)
    centred = bootstrap_interval(distance, x, n=100, seed=0, paired=True, centred=True)
    assert distance(x) < plain[0]
    assert centred[0] < distance(x) < centred[1]
    assert math.isclose(plain[1] - plain[0], centred[1] - centred[0], rel_tol=1e-9)


@pytest.mark.slow
def test_centred_interval_covers_the_expected_distance() -> None:
    """Nominal 95 %: the expected distance at this N lies inside in at least 90 of 100 experiments (measured: 95-99)."""
    distance = frechet_to(*moments(gaussian(2000, 8, 0)))
    truth = np.mean([distance(gaussian(100, 8, 1000 + i, 0.3, 1.2)) for i in range(2000)])
    inside = 0
    for i in range(100):
        x = gaussian(100, 8, 10_000 + i, 0.3, 1.2)
        low, high = bootstrap_interval(distance, x, n=200, seed=i, paired=True, centred=True)
        inside += low <= truth <= high
    assert inside >= 90


def test_accuracy_by_hand() -> None:
    logits = {
        "shape": torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [9.0, 1.0, 2.0]]),
        "colour": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]),
    }
    labels = {"colour": torch.tensor([0, 0, 1, 1]), "shape": torch.tensor([0, 2, 1, 1])}  # another order of keys
    assert prompt_accuracy(logits, labels) == {"shape": 0.75, "colour": 0.75, "all": 0.5}
    torch.testing.assert_close(prompt_hits(logits, labels)["all"], torch.tensor([True, False, True, False]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ({"a": torch.zeros(3, 2)}, {"b": torch.zeros(3).long()}, "same attributes"),
        ({"all": torch.zeros(3, 2)}, {"all": torch.zeros(3).long()}, "same attributes"),
        ({}, {}, "same attributes"),
        ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(4).long()}, "a: expected"),
        ({"a": torch.zeros(0, 2)}, {"a": torch.zeros(0).long()}, "a: expected"),
        ({"a": torch.full((3, 2), torch.nan)}, {"a": torch.zeros(3).long()}, "finite"),
    ],
)
def test_bad_logits(logits: dict[str, Tensor], labels: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_accuracy(logits, labels)
