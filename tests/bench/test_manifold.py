"""Variety: closed forms on points placed by hand, brute force, and the collapses that distances to the mean let pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.bench import manifold
from stepdistill.bench.manifold import coverage, diversity, precision, prompt_diversities, recall
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
    from stepdistill.bench.metrics import frechet_to

    d = 6
    corners = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    generated = corners.repeat(50, 1) + 1e-9 * normal(600, d)
    generated = (generated - generated.mean(0)) @ torch.linalg.cholesky(generated.T.cov()).inverse().T
    real = normal(600, d, seed=3)
    assert frechet_to(torch.zeros(d).double(), torch.eye(d).double())(generated) < 1e-6
    assert recall(real.flip(0) + 0.01, real) > 0.95
    assert recall(generated, real) == 0.0


def test_moved_turned_and_scaled_together_nothing_changes() -> None:
    generated, real = normal(60, 5), 1.2 * normal(50, 5, seed=1)
    turn = torch.linalg.qr(normal(5, 5, seed=2)).Q
    for measure in (recall, precision, coverage):
        value = measure(generated, real)
        assert 0.1 < value < 0.99
        assert measure(3 * generated @ turn + 7, 3 * real @ turn + 7) == value
        assert measure(generated.flip(0), real[torch.randperm(50, generator=torch.Generator().manual_seed(0))]) == value


def test_duplicates_have_balls_of_radius_zero() -> None:
    generated = line(0, 0, 0, 0, 5)
    assert recall(generated, line(0, 1, 2, 3, 4), k=3) == 1.0  # the ball of 5 reaches to 0
    assert recall(generated[:4], line(0, 1, 2, 3, 4), k=3) == 1 / 5  # nothing but the very point


@pytest.mark.parametrize("measure", [recall, precision, coverage])
def test_too_few_images_for_k(measure) -> None:
    with pytest.raises(InputError, match=r"1 <= k < 4.*use more images"):
        measure(normal(4, 2), normal(9, 2), 4)
    with pytest.raises(InputError, match="1 <= k < 4"):
        measure(normal(9, 2), normal(4, 2), 0)
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


def test_diversity_needs_two_images_of_a_prompt() -> None:
    for shape in ((3, 1, 2), (3, 2)):
        with pytest.raises(ValueError, match="K >= 2"):
            diversity(torch.zeros(shape))
    with pytest.raises(ValueError, match="finite"):
        diversity(torch.full((2, 2, 2), float("nan")))
