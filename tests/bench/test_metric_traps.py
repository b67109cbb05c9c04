"""What a harness gets wrong without noticing: each trap shown first, then what stands against it here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussians import gaussian, torchmetrics_frechet
from torch import Tensor, nn

from stepdistill.bench.features import JudgeFeatures, to_pixels
from stepdistill.bench.infinity import frechet_infinity
from stepdistill.bench.judge import Judge
from stepdistill.bench.kernels import cmmd, kid
from stepdistill.bench.manifold import coverage, diversity, recall
from stepdistill.bench.metrics import bootstrap_interval, frechet_distance, frechet_to, is_clear
from stepdistill.bench.moments import Moments, frechet_between, merged_by_index
from stepdistill.bench.plan import Plan
from stepdistill.bench.samples import Samples, image_hashes
from stepdistill.errors import InputError

FEW = "ignore:Frechet distance of"


class Quadrants(nn.Module):
    """Means of the quadrants of images [N, 3, H, W]: an extractor that takes any dtype and range."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


def pictures(n: int, seed: int, brighter: int = 0) -> np.ndarray:
    """Smooth images: a few random levels, enlarged."""
    levels = np.random.default_rng(seed).integers(0, 200, (n, 2, 2, 3), dtype=np.uint8) + np.uint8(brighter)
    return levels.repeat(8, 1).repeat(8, 2)


def test_normalize_of_torchmetrics_changes_what_a_network_sees() -> None:
    """Trap: with a network of one's own `normalize=True` doesn't turn floats into bytes, and the distance is 255^2 times less.

    Here images are bytes everywhere, the extractor scales them, and distances are taken of features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = pictures(200, 0), pictures(200, 1, brighter=40)
    found = []
    for normalize in (False, True):
        metric = FrechetInceptionDistance(feature=Quadrants(), normalize=normalize, input_img_size=(3, 16, 16))
        for images, real in ((a, True), (b, False)):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            metric.update(pixels / 255 if normalize else pixels, real=real)
        found.append(float(metric.compute()))
    assert found[0] == pytest.approx(255**2 * found[1], rel=1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = JudgeFeatures(Judge({"shape": 3}, resolution=16, width=4, dense=6))
    x, y = features(a), features(b)
    assert frechet_distance(x, y) == pytest.approx(torchmetrics_frechet(x, y), rel=1e-6)
    for floats in (a.astype(np.float32) / 255, to_pixels(a)):
        with pytest.raises(ValueError, match="uint8"):
            features(floats)


@pytest.mark.filterwarnings(FEW)
def test_small_samples_of_one_distribution_look_far_apart() -> None:
    """Trap: at d = 512 the distance of equal distributions is 738 for 64 images and 132 for 1,000. KID's isn't."""
    d = 512
    at = {n: (gaussian(n, d, 2 * n), gaussian(n, d, 2 * n + 1)) for n in (64, 1000)}
    assert frechet_distance(*at[64]) == pytest.approx(738, rel=0.01)
    assert frechet_distance(*at[1000]) == pytest.approx(132, rel=0.01)
    assert all(abs(kid(a, b)) < 0.1 * kid(a, b + 0.3) for a, b in at.values())


def test_extrapolation_takes_the_bias_of_few_images_away() -> None:
    """Two students equally far from the data: the one with fewer images looks worse until both are taken to infinity."""
    d, distance = 16, frechet_to(torch.zeros(16).double(), torch.eye(16).double())
    samples = [[gaussian(n, d, 50 * n + i, mean=0.1) for i in range(10)] for n in (400, 4000)]
    few, many = ([distance(x) for x in some] for some in samples)
    assert min(few) > 1.4 * max(many)
    few, many = ([frechet_infinity(distance, x, i).value for i, x in enumerate(some)] for some in samples)
    error = math.hypot(np.std(few), np.std(many)) / math.sqrt(10)
    assert abs(np.mean(few) - np.mean(many)) < 3 * error < 0.1
    assert np.mean(many) == pytest.approx(0.16, abs=0.02)


def test_a_ratio_near_the_floor_says_nothing() -> None:
    """Trap: true distances 16 times apart measure 1.1 times apart at N = 256; so such a ratio is never stated."""
    d, small, large = 64, 0.03, 0.48
    distance = frechet_to(torch.zeros(d).double(), torch.eye(d).double())

    def measured(n: int, truth: float, seed: int) -> float:
        return distance(gaussian(n, d, seed, mean=math.sqrt(truth / d)))

    floors = torch.tensor([measured(256, 0.0, seed) for seed in range(100, 120)])
    floor, spread = float(floors.mean()), float(floors.std())
    near, far = (np.mean([measured(256, truth, seed) for seed in range(5)]) for truth in (small, large))
    assert 1.05 < far / near < 1.2
    assert not is_clear(near, floor, spread)
    floors = torch.tensor([measured(20_000, 0.0, seed) for seed in range(200, 205)])
    floor, spread = float(floors.mean()), float(floors.std())
    near, far = (np.mean([measured(20_000, truth, seed) for seed in range(300, 306)]) for truth in (small, large))
    assert is_clear(near, floor, spread) and is_clear(far, floor, spread)
    assert (far - floor) / (near - floor) == pytest.approx(16, rel=0.15)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_a_collapse_that_cmmd_misses_and_recall_catches() -> None:
    """Trap: good pictures, but always the same 200. CMMD is 10 |difference of means|^2 and passes them."""
    d, images = 64, 5
    real, fresh, few = (unit(1 + gaussian(n, d, seed)) for n, seed in ((1000, 0), (1000, 1), (200, 2)))
    collapsed = (few[:, None] + 1e-3 * gaussian(1000, d, 3).reshape(200, images, d)).flatten(0, 1)
    worse = unit(1.3 + gaussian(1000, d, 4))  # a slight shift of a model with all its variety
    assert cmmd(collapsed, real) < 0.2 * cmmd(worse, real)
    assert cmmd(collapsed, real) < 0.01 * cmmd(-fresh, real)
    assert abs(cmmd(fresh, real)) < 0.02
    assert recall(fresh, real) > 0.5 and recall(worse, real) > 0.1
    assert recall(collapsed, real) < 0.01
    assert coverage(collapsed, real) < 0.7 * coverage(fresh, real)
    assert diversity(collapsed.reshape(200, images, d)) < 0.02 * diversity(fresh.reshape(200, images, d))


def shares(n: int, processes: int, batch: int) -> list[list[int]]:
    """Indices as padded samplers hand them out: whole batches for all processes, begun again at the first."""
    total = math.ceil(n / (processes * batch)) * processes * batch
    return [[i % n for i in range(rank, total, processes)] for rank in range(processes)]


def test_prompts_that_padded_samplers_repeat_count_once() -> None:
    """Trap: 20 prompts on 3 processes in batches of 4 make 24 images, four of them twice, and every number moves."""
    n = 20
    images, real = gaussian(n, 2, 0), gaussian(60, 2, 1)
    parts = [(share, images[share]) for share in shares(n, 3, 4)]
    padded = torch.cat([features for _, features in parts])
    assert len(padded) == 24
    whole, counted = Moments(2), Moments(2)
    whole.update(images)
    for _, features in parts:
        part = Moments(2)
        part.update(features)
        counted.merge(part)
    reference = Moments(2)
    reference.update(real)
    exact = frechet_between(reference, whole)
    assert counted.count == 24 and abs(frechet_between(reference, counted) - exact) > 1e-3  # moments can't know
    assert (recall(padded, real), kid(padded, real)) != (recall(images, real), kid(images, real))
    merged = merged_by_index(parts, n)
    assert torch.equal(merged, images)
    once = Moments(2)
    once.update(merged)
    assert frechet_between(reference, once) == exact
    for measure in (recall, coverage, kid, cmmd):
        assert measure(merged, real) == measure(images, real)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_batches_are_dealt_out_not_sampled(processes: int) -> None:
    """So no process repeats an image to fill its last batch; images that are equal all the same are counted."""
    n, plan = 20, Plan(tuple(f"prompt {i}" for i in range(20)), "here", diversity=(0, 0), batch_size=3)
    hands = [[b for b in plan.batches() if b.number % processes == rank] for rank in range(processes)]
    seen = [b.start + i for hand in hands for b in hand for i in range(len(b.prompts))]
    assert sorted(seen) == list(range(n))
    images = pictures(n, 0)
    padded = images[sum(shares(n, 3, 4), [])]
    copies = [Samples(gaussian(len(x), 2, 0), None, {}, image_hashes(x), 1.0).copies for x in (images[seen], padded)]
    assert copies == [0, 4]


def test_images_of_another_run_are_refused() -> None:
    """Trap: a folder that held more images, or those of another seed, before this sweep."""
    x = gaussian(8, 3, 0)
    with pytest.raises(InputError, match="images of another run"):
        merged_by_index([(range(8), x)], 6)
    with pytest.raises(InputError, match="images of another run"):
        merged_by_index([(range(8), x), ([3], gaussian(1, 3, 1))], 8)
    with pytest.raises(InputError, match="got none of 1"):
        merged_by_index([(range(7), x[:7])], 8)


def test_an_interval_that_is_not_centred_lies_off_the_distance() -> None:
    """Trap: a resample has 63 % distinct images, which is the small-sample bias once more."""
    distance, x = frechet_to(torch.zeros(16).double(), torch.eye(16).double()), gaussian(300, 16, 1)
    plain = bootstrap_interval(distance, x, n=60, seed=0, paired=True)
    centred = bootstrap_interval(distance, x, n=60, seed=0, paired=True, centred=True)
    assert distance(x) < plain[0] and centred[0] < distance(x) < centred[1]
