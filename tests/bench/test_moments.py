"""Moments in parts: their sums, merging, far from 0, on file; distances between them in closed form; rows by their prompts."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from gaussians import gaussian, rotation, torchmetrics_frechet
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.bench.metrics import frechet_distance
from stepdistill.bench.moments import Moments, frechet_between, merged_by_index
from stepdistill.errors import InputError


def measured(features: Tensor, *sizes: int) -> Moments:
    """Moments of features, taken in by parts of these sizes."""
    found = Moments(features.shape[1])
    for part in features.split(sizes or len(features)):
        found.update(part)
    return found


def given(mean: Tensor, cov: Tensor, count: int = 1000) -> Moments:
    """Moments with exactly this mean and covariance."""
    return Moments.from_tensors({"count": torch.tensor(count), "mean": mean, "scatter": cov * (count - 1)})


def close(a: Moments, b: Moments, rel: float = 1e-12) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=rel, atol=rel * float(b.mean.abs().max()))
    torch.testing.assert_close(a.cov, b.cov, rtol=rel, atol=rel * float(b.cov.abs().max()))


def test_three_points_by_hand() -> None:
    found = measured(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 6.0]]), 1, 2)
    assert found.count == 3
    torch.testing.assert_close(found.mean, torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(found.cov, torch.tensor([[3.0, -3.0], [-3.0, 12.0]]).double())


@pytest.mark.parametrize("sizes", [(60,), (1,) * 60, (7, 1, 52), (59, 1)])
def test_parts_are_the_whole(sizes: tuple[int, ...]) -> None:
    x = gaussian(60, 5, 0, mean=3.0)
    found = measured(x, *sizes)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.cov, x.T.cov(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cuts", [(500,), (1,), (999,), (200, 201, 700)])
def test_merged_is_the_whole(cuts: tuple[int, ...]) -> None:
    x = gaussian(1000, 8, 0, mean=-2.0) * torch.linspace(0.1, 10, 8).double()
    parts = [measured(part) for part in x.tensor_split(cuts)]
    forth, back = Moments(8), Moments(8)
    for part in parts:
        forth.merge(part)
    for part in reversed(parts):
        back.merge(part)
    close(forth, measured(x))
    close(back, measured(x))
    close(parts[0], measured(x[: cuts[0]]), rel=0) if cuts[0] > 1 else None


def test_an_empty_part_changes_nothing() -> None:
    x, empty = gaussian(20, 3, 0), Moments(3)
    found = measured(x)
    found.merge(empty)
    close(found, measured(x), rel=0)
    empty.merge(found)
    close(empty, found)
    nothing = Moments(3)
    nothing.merge(Moments(3))
    assert nothing.count == 0


def test_far_from_zero_and_wherever_the_first_part_lies() -> None:
    """Multiples of 2^-20 and shifts of 2^30 add without rounding, so the covariance must not change, to the last digits."""
    x = (gaussian(400, 4, 0) * 2**20).round() / 2**20
    torch.testing.assert_close(measured(x + 2**30, *[50] * 8).cov, x.T.cov(), rtol=1e-12, atol=1e-13)
    joined = Moments(4)
    for part in (x + 2**30).split(80):
        joined.merge(measured(part, 30, 50))
    torch.testing.assert_close(joined.cov, x.T.cov(), rtol=1e-12, atol=1e-13)
    first = x.clone()
    first[:50] += 2**20  # a first part that says nothing of the others: they must not be counted around it
    rest = measured(first, *[50] * 8)
    torch.testing.assert_close(rest.mean, first.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(rest.cov, first.T.cov(), rtol=1e-12, atol=0)
    y = (gaussian(300, 4, 1, mean=0.5) * 2**20).round() / 2**20
    near, far = frechet_distance(x, y), frechet_between(measured(x + 2**30), measured(y + 2**30))
    assert math.isclose(near, far, rel_tol=1e-12)


def test_any_float_type_is_summed_in_double() -> None:
    x = gaussian(50, 3, 0).half().requires_grad_()
    found = measured(x, 20, 30)
    close(found, measured(x.detach().double(), 20, 30), rel=0)
    assert not found.cov.requires_grad


def test_what_is_handed_out_is_the_callers() -> None:
    x = gaussian(40, 3, 0)
    kept = x.clone()
    found = measured(x[:20])
    mean, cov, tensors = found.mean, found.cov, found.tensors()
    before = mean.clone(), cov.clone(), {name: value.clone() for name, value in tensors.items()}
    again = Moments.from_tensors(tensors)
    found.update(x[20:])
    again.update(x[20:])
    torch.testing.assert_close((mean, cov, tensors), before, rtol=0, atol=0)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    close(again, found)


def test_memory_is_of_the_dimension_alone() -> None:
    few, many = measured(gaussian(20, 6, 0)), measured(gaussian(5000, 6, 0), *[50] * 100)
    for found in (few, many):
        assert sum(value.numel() for value in found.tensors().values()) == 1 + 6 + 6 * 6
        assert sum(value.numel() for value in vars(found).values() if isinstance(value, Tensor)) == 2 * 6 + 6 * 6


def test_through_a_file(tmp_path: Path) -> None:
    found = measured(gaussian(30, 4, 0), 11, 19)
    save_file(found.tensors(), tmp_path / "moments.safetensors")
    again = Moments.from_tensors(load_file(tmp_path / "moments.safetensors"))
    assert (again.count, again.dim) == (30, 4)
    close(again, found, rel=0)


def test_bad_features() -> None:
    found = measured(gaussian(5, 3, 0))
    for x, message in [
        (torch.zeros(2, 4), r"one dimension, got \[3, 4\]"),
        (torch.zeros(0, 3), "at least 1 images, got 0"),
        (torch.full((2, 3), math.inf), "finite"),
        (torch.zeros(3), "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            found.update(x)
    with pytest.raises(ValueError, match=r"one dimension, got \[3, 4\]"):
        found.merge(Moments(4))
    with pytest.raises(ValueError, match=r"one dimension, got \[3, 4\]"):
        frechet_between(found, measured(gaussian(5, 4, 0)))
    close(found, measured(gaussian(5, 3, 0)), rel=0)  # what was refused has left no trace
    with pytest.raises(ValueError, match="dimension >= 1, got 0"):
        Moments(0)


def test_too_few_images() -> None:
    found = Moments(3)
    with pytest.raises(ValueError, match="at least 1 images, got 0"):
        _ = found.mean
    found.update(torch.ones(1, 3))
    torch.testing.assert_close(found.mean, torch.ones(3).double())
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = found.cov
    for pair in ((found, measured(gaussian(5, 3, 0))), (measured(gaussian(5, 3, 0)), found)):
        with pytest.raises(ValueError, match="at least 2 images, got 1"):
            frechet_between(*pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(4)}, "expected count"),
        ({"mean": torch.zeros(())}, "expected count"),
        ({"scatter": torch.zeros(3)}, "expected count"),
        ({"count": torch.ones(1)}, "expected count"),
        ({"more": torch.zeros(3)}, "expected count"),
        ({"count": torch.tensor(-1)}, "count >= 0"),
        ({"mean": torch.full((3,), math.nan)}, "finite"),
    ],
)
def test_bad_tensors(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments.from_tensors({**measured(gaussian(5, 3, 0)).tensors(), **change})
    with pytest.raises(ValueError, match="expected count"):
        Moments.from_tensors({})


def test_two_gaussians_of_common_axes() -> None:
    q, d = rotation(6, 0), 6
    a, b = torch.linspace(0.2, 3, d).double(), torch.linspace(2, 0.5, d).double()
    shift = torch.linspace(-1, 1, d).double()
    truth = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    x, y = given(torch.zeros(d).double(), q @ a.diag() @ q.T), given(shift, q @ b.diag() @ q.T, count=77)
    assert math.isclose(frechet_between(x, y), truth, rel_tol=1e-12)
    assert math.isclose(frechet_between(y, x), truth, rel_tol=1e-12)


def test_two_gaussians_of_any_axes() -> None:
    """In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), also where A and B don't commute."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    product = a @ b
    truth = float(1 + a.trace() + b.trace() - 2 * (product.trace() + 2 * product.det().sqrt()).sqrt())
    x, y = given(torch.zeros(2).double(), a), given(torch.tensor([0.6, 0.8], dtype=torch.float64), b)
    assert math.isclose(frechet_between(x, y), truth, rel_tol=1e-12)
    assert frechet_between(x, x) < 1e-12


@pytest.mark.parametrize(("n", "d"), [(2000, 32), (30, 48), (50, 1)])
@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_between_moments_as_between_features(n: int, d: int) -> None:
    x, y = gaussian(n, d, 0), gaussian(n + 7, d, 1, mean=0.3, scale=1.2)
    found = frechet_between(measured(x, n // 3, n - n // 3), measured(y))
    # the root of a covariance's zeros is that of their rounding, 1e-8 of the largest
    assert math.isclose(found, frechet_distance(x, y), rel_tol=1e-12 if n > d else 1e-7)
    assert math.isclose(found, torchmetrics_frechet(x, y), rel_tol=1e-6)


def test_few_images_warn() -> None:
    few, fewer, many = (measured(gaussian(n, 8, n)) for n in (78, 77, 200))
    with pytest.warns(UserWarning, match="78 images in 8 dimensions"):
        frechet_between(few, many)
    with pytest.warns(UserWarning, match="77 images in 8 dimensions"):
        frechet_between(many, fewer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_between(many, few)  # said already
        frechet_between(many, many)


def test_rows_come_back_by_their_prompts() -> None:
    x = gaussian(10, 3, 0)
    parts = [
        (range(1, 10, 3), x[1::3]),
        (torch.tensor([2, 8, 5]), x[[2, 8, 5]]),
        ([], x[:0]),
        ([9, 0, 3, 6], x[[9, 0, 3, 6]]),
    ]
    torch.testing.assert_close(merged_by_index(parts, 10), x, rtol=0, atol=0)
    torch.testing.assert_close(merged_by_index([(range(10), x.half())], 10), x.half().double(), rtol=0, atol=0)


def test_equal_copies_are_dropped_and_others_refused() -> None:
    x = gaussian(5, 3, 0, mean=10)
    again = x[:2] * (1 + 1e-7)  # another batch, another rounding
    both = merged_by_index([(range(5), x), ([0, 1], again)], 5)
    torch.testing.assert_close(both, x, rtol=0, atol=0)  # the first part's stay
    torch.testing.assert_close(merged_by_index([([0, 1], again), (range(5), x)], 5)[:2], again, rtol=0, atol=0)
    zeros = torch.zeros(2, 3)
    assert len(merged_by_index([([0, 1], zeros), ([1, 0], zeros)], 2)) == 2
    with pytest.raises(InputError, match="one image a prompt, got different ones of number 1; empty"):
        merged_by_index([(range(5), x), ([0, 1], torch.stack([x[0], x[1] * 1.001]))], 5)
    with pytest.raises(InputError, match="different ones of number 3"):
        merged_by_index([([0, 1, 2, 3, 3, 4], torch.cat([x[:4], x[4:], x[4:]]))], 5)


@pytest.mark.parametrize(
    ("parts", "n", "message"),
    [
        (
            [([0, 1, 3], torch.ones(3, 2))],
            5,
            "features of 5 prompts, got none of 2, the first of which is number 2; run",
        ),
        ([([], torch.ones(0, 2))], 1, "got none of 1"),
        ([([0, 1, 5], torch.ones(3, 2))], 2, "indices of 2 prompts, got 0 to 5; empty"),
        ([([0, 1, 2], torch.ones(3, 2))], 2, "indices of 2 prompts, got 0 to 2"),
        ([([0, -1], torch.ones(2, 2))], 2, "indices of 2 prompts, got -1 to 0"),
        ([([0, 1], torch.ones(3, 2))], 2, "an index for each row"),
        ([([0], torch.ones(1, 2)), ([1], torch.ones(1, 3))], 2, "one dimension"),
        ([([0], torch.full((1, 2), math.nan))], 1, "finite"),
        ([], 1, "parts"),
        ([([], torch.ones(0, 2))], 0, "n >= 1"),
    ],
)
def test_parts_that_are_no_whole(parts: list[tuple[list[int], Tensor]], n: int, message: str) -> None:
    with pytest.raises(InputError if "prompts" in message else ValueError, match=message):
        merged_by_index(parts, n)
