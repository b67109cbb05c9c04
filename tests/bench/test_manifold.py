"""Variety: closed forms on points placed by hand, brute force, and the collapses that distances to the mean let pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.bench import manifold
from stepdistill.bench.kernels import kid
from stepdistill.bench.manifold import coverage, diversity, precision, prompt_diversities, recall
from stepdistill.bench.metrics import bootstrap_interval, frechet_to
from stepdistill.errors import InputError


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


def line(*points: float) -> Tensor:
    return torch.tensor(points, dtype=torch.float64)[:, None]


def by_hand(points: Tensor, centres: Tensor, k: int) -> float:
    """Recall's definition, one pair at a time."""
    inside = 0
    for x in points:
        for i, c in enumerate(centres):
            others = sorted(float((c - o).norm()) for j, o in enumerate(centres) if j != i)
            if float((x - c).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


def test_recall_and_precision_of_points_on_a_line() -> None:
    generated, real = line(0, 1, 3, 10), line(-1, -1.5, 2, 6, 18)
    # k = 1: balls of radius 1, 1, 2 and 7 around 0, 1, 3 and 10; -1 lies on a surface, 18 outside by 1
    assert recall(generated, real, k=1) == 3 / 5
    # real: radii 0.5, 0.5, 3, 4, 12; 0 to 10 all lie in the ball of 18 or of 2
    assert precision(generated, real, k=1) == 1.0
    assert precision(line(0, 1, 40, 10), real, k=1) == 3 / 4
    assert precision(generated, real, k=1) == recall(real, generated, k=1)


def test_coverage_of_points_on_a_line() -> None:
    generated, real = line(0, 1, 3, 10), line(-1, -1.5, 2, 6, 18)
    # k = 1: |0 + 1| > .5, 1.5 > .5, |2 - 1| <= 3, |6 - 3| <= 4, |18 - 10| <= 12
    assert coverage(generated, real, k=1) == 3 / 5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_against_the_definition_in_blocks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK", 7)
    generated, real = normal(40, 6), 1.3 * normal(30, 6, seed=1)
    assert recall(generated, real, k) == by_hand(real, generated, k)
    assert precision(generated, real, k) == by_hand(generated, real, k)
    distances = torch.cdist(real, real)
    radii = distances.sort(1).values[:, k]
    assert coverage(generated, real, k) == float(
        (torch.cdist(real, generated) <= radii[:, None]).any(1).double().mean()
    )


def test_a_lost_mode_costs_recall_its_share_and_precision_nothing() -> None:
    modes = torch.zeros(4, 8, dtype=torch.float64)
    modes[range(4), range(4)] = 100.0
    real = normal(400, 8) + modes.repeat_interleave(100, 0)
    generated = normal(300, 8, seed=1) + modes[:3].repeat_interleave(100, 0)
    whole = normal(400, 8, seed=2) + modes.repeat_interleave(100, 0)
    assert recall(generated, real) == pytest.approx(0.75 * recall(whole, real), abs=0.03)
    assert coverage(generated, real) == pytest.approx(0.75 * coverage(whole, real), abs=0.03)
    assert precision(generated, real) == pytest.approx(precision(whole, real), abs=0.03)
    assert recall(whole, real) > 0.8


def test_an_outlier_buys_recall_but_no_coverage() -> None:
    real, generated = normal(200, 4), 0.01 * normal(200, 4, seed=1)
    far = torch.cat([generated, torch.full((1, 4), 50.0, dtype=torch.float64)])
    assert recall(generated, real) < 0.05 and coverage(generated, real) < 0.2
    assert recall(far, real) > 0.4
    assert coverage(far, real) == coverage(generated, real)


def test_collapse_to_a_few_images_that_keep_mean_and_covariance() -> None:
    """Twice d points on the axes have a Gaussian's first two moments to the digit: Frechet's distance is 0, recall is not."""
    d = 6
    corners = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    generated = corners.repeat(50, 1) + 1e-9 * normal(600, d)
    generated = (generated - generated.mean(0)) @ torch.linalg.cholesky(generated.T.cov()).inverse().T
    real = normal(600, d, seed=3)
    assert frechet_to(torch.zeros(d).double(), torch.eye(d).double())(generated) < 1e-6
    assert abs(kid(generated, real)) < 0.1  # a cubic kernel sees three moments, and the third are right too
    assert recall(real.flip(0) + 0.01, real) > 0.95
    assert recall(generated, real) == 0.0


def test_collapse_to_two_hundred_images_that_hides_near_the_floor() -> None:
    """Good images, each drawn five times: Frechet distance and KID see fewer images at most, recall sees the copies."""
    d = 16
    distance = frechet_to(torch.zeros(d).double(), torch.eye(d).double())
    real, few, fresh = normal(1000, d), normal(200, d, seed=1), normal(1000, d, seed=2)
    generated = (few[:, None] + 0.05 * normal(1000, d, seed=3).reshape(200, 5, d)).flatten(0, 1)
    assert distance(generated) == pytest.approx(distance(few), rel=0.05) and distance(few) < 0.1 * distance(1.5 * fresh)
    assert abs(kid(generated, real)) < 0.1 * kid(1.5 * fresh, real)
    assert recall(fresh, real) > 0.7 and recall(generated, real) < 0.01
    assert precision(generated, real) == pytest.approx(precision(fresh, real), abs=0.1)
    assert coverage(generated, real) < 0.8 * coverage(fresh, real)


def test_two_samples_of_one_distribution() -> None:
    """Recall and precision have one expectation then; coverage's is 1 - (N - 1)...(N - k) / ((2N - 1)...(2N - k))."""
    generated, real = normal(1000, 8), normal(1000, 8, seed=1)
    assert recall(generated, real) == pytest.approx(precision(generated, real), abs=0.04)
    assert recall(generated, normal(4000, 8, seed=2)) == pytest.approx(recall(generated, real), abs=0.03)
    expected = 1 - math.prod((1000 - i) / (2000 - i) for i in range(1, 6))
    assert coverage(generated, real) == pytest.approx(expected, abs=0.02)
    expected = 1 - math.prod((1000 - i) / (1500 - i) for i in range(1, 6))
    assert coverage(generated[:500], real) == pytest.approx(expected, abs=0.05)


def test_moved_turned_and_scaled_together_nothing_changes() -> None:
    generated, real = normal(60, 5), 1.2 * normal(50, 5, seed=1)
    turn = torch.linalg.qr(normal(5, 5, seed=2)).Q
    for measure in (recall, precision, coverage):
        value = measure(generated, real)
        assert 0.1 < value < 0.99
        assert measure(3 * generated @ turn + 7, 3 * real @ turn + 7) == value
        assert measure(generated.flip(0), real[torch.randperm(50, generator=torch.Generator().manual_seed(0))]) == value
        # multiples of 2^-10, so that the shift itself rounds nothing
        generated, real = (generated * 1024).round() / 1024, (real * 1024).round() / 1024
        assert measure(generated + 1e6, real + 1e6) == measure(generated, real)
        assert measure(generated.float(), real.float()) == measure(generated, real)


def test_duplicates_have_balls_of_radius_zero() -> None:
    generated = line(0, 0, 0, 0, 5)
    assert recall(generated, line(0, 1, 2, 3, 4), k=3) == 1.0  # the ball of 5 reaches to 0
    assert recall(generated[:4], line(0, 1, 2, 3, 4), k=3) == 1 / 5  # nothing but the very point


def test_copies_are_copies_in_large_sets_too() -> None:
    """Far from 0 and among many, where distances by products are not 0 between equal points."""
    images = 50 + normal(100, 64)
    copied, near = images.repeat(4, 1), images + 1e-9
    assert recall(copied, torch.cat([images, near, near])) == 1 / 3
    assert precision(torch.cat([images, near, near]), copied) == 1 / 3
    assert coverage(torch.cat([images[:25], near]), copied, k=3) == 1 / 4


def test_ties_lie_inside() -> None:
    """Every point of a lattice has its nearest others at distance 1 exactly, and so the lattice moved by 1 on a surface."""
    axis = torch.arange(6.0, dtype=torch.float64) + 100.125
    lattice = torch.cartesian_prod(axis, axis, axis)
    moved = lattice + torch.tensor([0.0, 0.0, 6.0]).double()  # one of six layers touches
    for measure in (recall, precision):
        assert measure(lattice, moved, 3) == 1 / 6
    assert coverage(lattice, moved, 3) == 1 / 6


def test_memory_is_one_block_of_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, distances = [], manifold._distances

    def spy(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((len(a), len(b)))
        return distances(a, b)

    monkeypatch.setattr(manifold, "_distances", spy)
    monkeypatch.setattr(manifold, "_BLOCK", 7)
    for measure in (recall, precision, coverage):
        measure(normal(40, 2), normal(30, 2), 3)
    assert max(rows for rows, _ in shapes) == 7


@pytest.mark.parametrize(("measure", "balls"), [(recall, "generated"), (precision, "real"), (coverage, "real")])
def test_too_few_images_for_k(measure: Callable[..., float], balls: str) -> None:
    few, many = normal(4, 2), normal(9, 2)
    sets, other = ((few, many), (many, few)) if balls == "generated" else ((many, few), (few, many))
    with pytest.raises(InputError, match=f"more than k = 4 {balls} images, got 4; use more images or a smaller k"):
        measure(*sets, 4)
    assert 0 <= measure(*sets, 3) <= 1
    assert 0 <= measure(*other, 4) <= 1  # the set without balls may be small
    with pytest.raises(ValueError, match="k >= 1, got 0"):
        measure(many, many, 0)
    with pytest.raises(ValueError, match="at least 2 images"):
        measure(many, many[:1], 1)
    with pytest.raises(ValueError, match="one dimension"):
        measure(normal(9, 2), normal(9, 3), 3)
    with pytest.raises(ValueError, match="finite"):
        measure(normal(9, 2) / 0, normal(9, 2), 3)


def test_diversity_of_three_points_by_hand() -> None:
    prompt = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
    assert torch.equal(prompt_diversities(prompt[None]), torch.tensor([(5.0 + 8.0 + 5.0) / 3]).double())
    both = torch.stack([prompt, torch.ones(3, 2)])
    assert prompt_diversities(both).tolist() == [6.0, 0.0]
    assert diversity(both) == 3.0


def test_diversity_of_a_gaussian() -> None:
    """E |x - y| = 2 s Gamma((d + 1) / 2) / Gamma(d / 2) for x and y of N(0, s^2) in d dimensions."""
    d, s = 16, 0.7
    features = (
        s * normal(500 * 8, d).reshape(500, 8, d) + 100 * normal(500, d, seed=1)[:, None]
    )  # prompts lie far apart
    expected = 2 * s * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    assert diversity(features) == pytest.approx(expected, rel=0.01)


def test_diversity_is_read_prompt_by_prompt() -> None:
    """So a bootstrap over prompts is one over rows; and a far-away prompt takes no digits from the others."""
    features = torch.stack([i * normal(6, 4, seed=i) for i in range(10)])
    each = prompt_diversities(features)
    assert each.dtype == torch.float64 and each.shape == (10,)
    for one, images in zip(each, features, strict=True):
        assert float(one) == pytest.approx(float(torch.cdist(images, images).sum() / 30), rel=1e-9)
    assert float(each.mean()) == diversity(features)
    low, high = bootstrap_interval(lambda x: float(x.mean()), each, n=200, seed=0, paired=True)
    assert low < diversity(features) < high
    assert prompt_diversities(features[:, :1].repeat(1, 40, 1) + 1e4).tolist() == [0.0] * 10


def test_diversity_needs_two_images_of_a_prompt() -> None:
    for shape in ((3, 1, 2), (3, 2), (0, 3, 2)):
        with pytest.raises(ValueError, match="at least 2 images" if shape[0] == 0 else "K >= 2"):
            diversity(torch.zeros(shape))
    with pytest.raises(ValueError, match="finite"):
        diversity(torch.full((2, 2, 2), float("nan")))
