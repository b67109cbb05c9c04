"""Kernel distances against their definitions pair by pair, torchmetrics, and closed forms on the circle."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import torch
from gaussians import Features, gaussian, moments, rotation
from torch import Tensor

from stepdistill.bench import kernels
from stepdistill.bench.kernels import cmmd, kid
from stepdistill.bench.metrics import frechet_to


def kernel(x: Tensor, y: Tensor) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def test_kid_is_its_definition_pair_by_pair() -> None:
    a, b = gaussian(7, 5, 0), gaussian(9, 5, 1, mean=0.5)
    within = [[kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j] for s in (a, b)]
    across = [kernel(x, y) for x in a for y in b]
    expected = sum(np.mean(values) for values in within) - 2 * np.mean(across)
    assert kid(a, b) == pytest.approx(expected, rel=1e-12)
    assert kid(b, a) == pytest.approx(expected, rel=1e-12)


def test_kid_of_two_pairs_by_hand() -> None:
    """d = 1, {0, 1} against {2, 3}: k(0, 1) = 1, k(2, 3) = 343, and (1 + 1 + 27 + 64) / 4 across."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    assert kid(a, b) == pytest.approx(1 + 343 - 2 * 93 / 4)


def test_kid_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = gaussian(300, 16, 0), gaussian(300, 16, 1, mean=0.2, scale=1.1)  # theirs needs sets of one size
    assert kid(a, b) == pytest.approx(float(poly_mmd(a, b, degree=3, gamma=None, coef=1.0)), rel=1e-9)


def test_kid_of_large_sets_in_blocks() -> None:
    a, b = gaussian(2500, 8, 0), gaussian(1700, 8, 1, mean=0.3)
    gram = [(x @ y.T / 8 + 1).pow(3) for x, y in ((a, a), (b, b), (a, b))]
    off = [(g.sum() - g.trace()) / (len(g) * (len(g) - 1)) for g in gram[:2]]
    assert kid(a, b) == pytest.approx(float(off[0] + off[1] - 2 * gram[2].mean()), rel=1e-9)


def test_kid_is_unbiased_where_frechet_is_not() -> None:
    """Two samples of one distribution: over many draws KID's mean is 0 within its error, the Frechet distance's is not."""
    pairs = [(gaussian(20, 8, 2 * i), gaussian(20, 8, 2 * i + 1)) for i in range(200)]
    values = torch.tensor([kid(a, b) for a, b in pairs])
    assert float(values.mean().abs()) < 3 * float(values.std()) / math.sqrt(len(values))
    assert float(values.min()) < 0
    assert min(frechet_to(*moments(a))(b) for a, b in pairs[:20]) > 1.0


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_is_torchmetrics_with_one_subset_of_all() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = gaussian(300, 16, 0), gaussian(300, 16, 1, mean=0.2, scale=1.1)
    metric = KernelInceptionDistance(feature=Features(16), subsets=1, subset_size=300, normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    with torch.random.fork_rng(devices=[]):
        value, _ = metric.compute()
    assert kid(a, b) == pytest.approx(float(value), rel=1e-6)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def rbf(x: Tensor, y: Tensor) -> float:
    return math.exp(-float((x - y).square().sum()) / (2 * 10.0**2))


def test_cmmd_is_its_definition_pair_by_pair() -> None:
    a, b = gaussian(7, 5, 0), gaussian(9, 5, 1, mean=0.5)
    u, v = unit(a), unit(b)
    within = [[rbf(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j] for s in (u, v)]
    across = [rbf(x, y) for x in u for y in v]
    expected = 1000 * (sum(np.mean(values) for values in within) - 2 * np.mean(across))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert cmmd(b, a) == pytest.approx(expected, rel=1e-9)
    assert cmmd(7 * a, b * torch.arange(1, 10)[:, None]) == pytest.approx(expected, rel=1e-9)  # the norm is ours
    turn = rotation(5, 2)
    assert cmmd(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_two_pairs_by_hand() -> None:
    """Directions 0, 90 against 180, 180 degrees: |x - y|^2 is 2 and 0 within, and 4, 4, 2, 2 across."""
    a, b = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [-3.0, 0.0]])
    expected = 1000 * (math.exp(-2 / 200) + 1 - math.exp(-4 / 200) - math.exp(-2 / 200))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-12)


def circle(n: int, seed: int, mean: float, scale: float) -> Tensor:
    """Points on the circle whose angles are Gaussian."""
    angles = gaussian(n, 1, seed, mean, scale)
    return torch.cat([angles.cos(), angles.sin()], 1)


def circle_truth(apart: float, s: float, t: float) -> float:
    """The kernel is e^-g (I_0(g) + 2 sum I_k(g) cos k(x - y)), g = 1 / 100, and E cos kx = e^(-k^2 s^2 / 2) cos km."""
    g, total = 0.01, 0.0
    for k in range(1, 6):
        a, b = math.exp(-(k**2) * s**2 / 2), math.exp(-(k**2) * t**2 / 2)
        total += 2 * scipy.special.ive(k, g) * (a**2 + b**2 - 2 * a * b * math.cos(k * apart))
    return 1000 * total


@pytest.mark.parametrize(("apart", "s", "t"), [(0.0, 0.5, 0.5), (0.6, 0.4, 0.4), (0.3, 0.2, 0.9)])
def test_cmmd_of_gaussian_angles_is_unbiased(apart: float, s: float, t: float) -> None:
    values = np.array([cmmd(circle(20, 2 * i, 0, s), circle(30, 2 * i + 1, apart, t)) for i in range(300)])
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - circle_truth(apart, s, t)) < 3 * error
    if not apart and s == t:
        assert values.min() < 0 < error < 0.02
    large = cmmd(circle(4000, 0, 0, s), circle(4000, 1, apart, t))
    assert large == pytest.approx(circle_truth(apart, s, t), rel=0.1, abs=0.01)


def test_cmmd_is_ten_times_the_squared_distance_of_means() -> None:
    a, b = unit(gaussian(500, 32, 0)), unit(gaussian(500, 32, 1, mean=2.0))
    apart = float((a.mean(0) - b.mean(0)).square().sum())
    assert cmmd(a, b) == pytest.approx(10 * apart, rel=0.02)


def test_cmmd_keeps_the_digits_of_sets_that_hardly_differ() -> None:
    """A turn by 1e-6 of a set of pairs: what is left is 1e-11, of kernels near 1."""
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    angle = 1e-6
    b = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.cos(angle), -math.sin(angle)]]).double()
    near = -2 * math.sin(angle / 2) ** 2 / 100  # the exponent of the near pair; the far pair's is -0.02 - near
    within, across = math.expm1(-0.02), (math.expm1(near) + math.expm1(-0.02 - near)) / 2
    assert cmmd(a, b) == pytest.approx(1000 * (2 * within - 2 * across), abs=1e-14)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_blocks_are_the_whole(distance: Callable[[Tensor, Tensor], float], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian(45, 6, 0), gaussian(31, 6, 1, mean=0.3)
    whole = distance(a, b)
    monkeypatch.setattr(kernels, "_BLOCK", 7)
    assert distance(a, b) == pytest.approx(whole, rel=1e-12)
    sizes: list[int] = []
    kernels._squared_mmd(a, b, lambda products: (sizes.append(products.numel()), products)[1])
    assert max(sizes) == 49  # and 45 for a set's points with themselves


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(1, 4), torch.ones(9, 4), "at least 2 images"),
        (torch.ones(9, 4), torch.ones(0, 4), "at least 2 images"),
        (torch.ones(9, 4), torch.ones(9, 5), "one dimension"),
        (torch.ones(9, 4), torch.full((9, 4), torch.nan), "finite"),
        (torch.ones(9, 4, 1), torch.ones(9, 4, 1), "shape"),
    ],
)
def test_features_without_a_kernel_distance(x: Tensor, y: Tensor, message: str) -> None:
    for distance in (kid, cmmd):
        with pytest.raises(ValueError, match=message):
            distance(x, y)


def test_an_embedding_without_a_direction() -> None:
    with pytest.raises(ValueError, match="nothing but zeros"):
        cmmd(torch.ones(3, 4), torch.eye(4) * torch.tensor([1.0, 0.0, 1.0, 1.0]))
