"""The numbers of a row: what they are made of, their intervals, and differences to the teacher in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.bench.infinity import frechet_infinity
from stepdistill.bench.kernels import cmmd, kid
from stepdistill.bench.manifold import coverage, diversity, recall
from stepdistill.bench.metrics import bootstrap_interval, frechet_distance, frechet_to
from stepdistill.bench.quality import Measure
from stepdistill.bench.reference import Reference
from stepdistill.bench.rows import TEACHER, Cell, Quality, Value
from stepdistill.bench.samples import Samples
from stepdistill.errors import InputError

N, DIM = 200, 3
FEW = pytest.mark.filterwarnings("ignore:Frechet distance of")
CELL, MAIN = Cell("lcm", 4, 1.0), Cell(TEACHER, 50, 2.0)


def normal(n: int = N, seed: int = 0, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return mean + scale * torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def samples(features: Tensor, **scores: Tensor) -> Samples:
    return Samples(features, None, scores, None, 8.0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    real = normal(1000, seed=9).double()
    about = {"source": "here", "count": 1000, "resolution": 32}
    return Reference(real.mean(0), real.T.cov(), real[:300].float(), torch.empty(0, DIM), about)


@pytest.fixture
def measure(reference: Reference) -> Measure:
    return Measure(reference, resamples=50)


def only(rows: list[Quality]) -> Quality:
    (row,) = rows
    return row


def test_the_values_of_a_row(reference: Reference, measure: Measure) -> None:
    features, real = normal(), reference.features.double()
    hits = (torch.arange(N) % 4 == 0).double()
    spread = normal(20, seed=5).reshape(10, 2, DIM)
    found = Samples(features, spread, {"accuracy": hits, "accuracy/shape": hits + 1}, None, 8.0)
    row = only(measure.rows(CELL, found, [N]))
    assert (row.cell, row.n, row.evaluations, row.against) == (CELL, N, 8.0, None)
    some = features.double()
    distance = frechet_to(reference.mean, reference.cov)
    options: dict[str, Any] = {"n": 50, "seed": 0, "paired": True}
    assert row.values == {
        "fd": Value(distance(some), bootstrap_interval(distance, some, centred=True, **options)),
        "kid": Value(kid(some, real)),
        "recall": Value(recall(some, real, 3)),
        "diversity": Value(diversity(spread.double())),
        "accuracy": Value(0.25, bootstrap_interval(lambda v: float(v.mean()), hits, **options)),
        "accuracy/shape": Value(1.25),
    }
    again = Measure(reference, resamples=50).values(found, N)
    assert again == row.values  # no state, no global generator


def test_a_distance_in_closed_form(measure: Measure) -> None:
    """Gaussians with one covariance are |difference of means|^2 apart, those with one mean (s - 1)^2 a dimension."""
    for mean, scale, exact in ((2.0, 1.0, 4.0 * DIM), (0.0, 3.0, 4.0 * DIM)):
        row = only(measure.rows(CELL, samples(normal(3_000, 1, mean, scale)), [3_000]))
        assert row.values["fd"].value == pytest.approx(exact, rel=0.1)


def test_smaller_sizes_are_the_first_of_all(measure: Measure) -> None:
    features, scores = normal(), torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = normal(seed=3)
    both, few = (
        measure.rows(
            CELL,
            samples(features[:n], **{"accuracy": scores[:n], "accuracy/shape": scores[:n]}),
            sizes,
            samples(other[:n]),
        )
        for n, sizes in ((N, [50, N]), (50, [50]))
    )
    assert both[0] == few[0] and [row.n for row in both] == [50, N]
    for key in ("fd", "accuracy", "accuracy/shape", "features_to_teacher"):
        assert both[0].values[key].value != both[1].values[key].value
    with pytest.raises(ValueError, match=f"expected {N + 1} images"):
        measure.rows(CELL, samples(features), [N + 1])


def test_a_model_is_not_apart_from_itself(measure: Measure) -> None:
    row = only(measure.rows(CELL, samples(normal()), [N], teacher=samples(normal())))
    assert row.against == Value(0.0, (0.0, 0.0))
    assert row.values["features_to_teacher"] == Value(0.0, (0.0, 0.0))


def test_a_shifted_model_is_apart_by_its_shift(reference: Reference, measure: Measure) -> None:
    """The covariance is the teacher's, so the distances differ by the means' alone: |m + c - mu|^2 - |m - mu|^2."""
    features, shift = normal(), torch.tensor([1.0, 0.0, 0.0])
    row = only(measure.rows(CELL, samples(features + shift), [N], teacher=samples(features)))
    offset = features.double().mean(0) - reference.mean
    exact = float((offset + shift).square().sum() - offset.square().sum())
    assert row.against is not None and row.against.interval is not None
    assert row.against.value == pytest.approx(exact, rel=1e-5)
    low, high = row.against.interval
    assert low < exact < high
    # what is drawn for both cancels: only 2 c (mean - mu) is left of the noise, of the standard deviation 2 / sqrt(N)
    assert high - low == pytest.approx(2 * 1.96 * 2 / N**0.5, rel=0.4)
    assert row.values["features_to_teacher"].value == pytest.approx(1.0, rel=1e-5)


def test_the_difference_has_the_draws_of_both(measure: Measure, reference: Reference) -> None:
    ours, theirs = normal(seed=1), normal(seed=2)
    row = only(measure.rows(CELL, samples(ours), [N], teacher=samples(theirs)))
    distance = frechet_to(reference.mean, reference.cov)

    def apart(a: Tensor, b: Tensor) -> float:
        return distance(a) - distance(b)

    expected = bootstrap_interval(apart, ours.double(), theirs.double(), n=50, seed=0, paired=True, centred=True)
    assert row.against is not None and row.against.interval == pytest.approx(expected, abs=1e-12)


def test_the_teacher_is_drawn_once(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = Measure._drawn

    def spy(self: Measure, found: Samples, n: int) -> Any:
        drawn.append(n)
        return original(self, found, n)

    monkeypatch.setattr(Measure, "_drawn", spy)
    teacher = samples(normal())
    measure.rows(MAIN, teacher, [N])
    for seed in (1, 2):
        measure.rows(CELL, samples(normal(seed=seed)), [N], teacher=teacher)
    assert len(drawn) == 3


@FEW
def test_pixels_of_the_first_images(measure: Measure) -> None:
    found, teacher = samples(normal(seed=1)), samples(normal())
    white, black = (np.full((8, 4, 4, 3), level, np.uint8) for level in (255, 0))
    half = white.copy()
    half[4:] = 0
    row = only(measure.rows(CELL, found, [N], teacher=teacher, images=(half, black)))
    assert row.values["rms_to_teacher"].value == 0.5
    row = only(measure.rows(CELL, found, [4], teacher=teacher, images=(half, black)))
    assert row.values["rms_to_teacher"] == Value(1.0, (1.0, 1.0))
    per_image = measure.per_image(found, teacher, (half, black))
    assert per_image["rms_to_teacher"] == [1.0] * 4 + [0.0] * 4
    assert len(per_image["features_to_teacher"]) == N
    assert "rms_to_teacher" not in only(measure.rows(CELL, found, [N], teacher=teacher)).values


def test_numbers_of_single_images(measure: Measure) -> None:
    scores = torch.tensor([1 / 3, 2 / 3] * 100, dtype=torch.float64)
    found = samples(normal(), clip_score=scores, **{"accuracy/shape": scores})
    assert measure.per_image(found) == {"clip_score": [0.333333, 0.666667] * 100}


def test_quantities_that_are_asked_for(reference: Reference) -> None:
    features, real = normal(), reference.features.double()
    measure = Measure(reference, seed=2, optional=("fd_infinity", "cmmd", "coverage"), resamples=5)
    values = measure.values(samples(features), N)
    distance = frechet_to(reference.mean, reference.cov)
    assert values["fd_infinity"] == Value(frechet_infinity(distance, features.double(), 2).value)
    assert values["cmmd"] == Value(cmmd(features.double(), real))
    assert values["coverage"] == Value(coverage(features.double(), real, 5))
    with pytest.raises(InputError, match="--metrics out of fd_infinity,cmmd,coverage, got fid"):
        Measure(reference, optional=("fid",))
    few = replace(reference, features=reference.features[:5])
    with pytest.raises(InputError, match="6 real images or more for --metrics coverage, got 5; give more --data"):
        Measure(few, optional=("coverage",))
    assert Measure(few).values(samples(features), N).keys() >= {"fd", "kid", "recall"}
    few = replace(reference, features=reference.features[:6])
    assert "coverage" in Measure(few, optional=("coverage",)).values(samples(features), N)


@FEW
def test_too_few_for_a_radius(measure: Measure) -> None:
    assert "recall" not in measure.values(samples(normal()), 3)
    assert "recall" in measure.values(samples(normal()), 4)


def test_few_images_are_warned_of(reference: Reference) -> None:
    for n, count, few in ((17, 500, 17), (430, 19, 19)):  # of either kind
        wide = Reference(
            torch.zeros(41), torch.eye(41).double(), torch.zeros(9, 41), torch.empty(0, 41), {"count": count}
        )
        with pytest.warns(UserWarning, match=f"Frechet distance of {few} images in 41 dimensions"):
            Measure(wide, resamples=2).values(samples(torch.randn(n, 41)), n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers(bad: float, measure: Measure) -> None:
    features = normal()
    features[3, 1] = bad
    with pytest.raises(ValueError, match="finite features"):
        measure.values(samples(features), N)


def test_real_images_give_the_floor_at_each_size(reference: Reference, measure: Measure) -> None:
    real = measure.real(samples(normal(100, seed=4)), [50, 100, 101])
    assert sorted(real) == ["100", "50"]
    expected = frechet_distance(normal(50, seed=4).double(), normal(1000, seed=9).double())
    assert real["50"]["fd"]["value"] == pytest.approx(frechet_distance(normal(100, seed=4)[:50], normal(1000, seed=9)))
    assert expected and isinstance(real["50"]["fd"]["interval"], list)
    assert real["50"]["kid"] == {"value": real["50"]["kid"]["value"], "interval": None}
    assert measure.real(None, [50]) == {}
