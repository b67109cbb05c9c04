"""The same features through torch-fidelity, which is no dependency: skipped where it isn't installed."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import gaussian
from packaging.version import Version
from vision import images

from stepdistill.bench.extractors import InceptionFeatures
from stepdistill.bench.kernels import cmmd, kid
from stepdistill.bench.manifold import precision, recall
from stepdistill.bench.metrics import frechet_distance
from stepdistill.bench.moments import Moments, frechet_between

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Frechet distance of")]
SETS = [
    (gaussian(400, 24, 0), gaussian(400, 24, 1, mean=0.2, scale=1.1)),
    (gaussian(90, 64, 2), gaussian(90, 64, 3, 0.3)),
]


def fidelity(part: str, least: str = "0.4") -> ModuleType:
    """A module of it, if torchvision fits, too. Before 0.4 it had no Gaussian kernel, and SciPy's old root."""
    try:
        found = version("torch-fidelity")
        module = importlib.import_module(f"torch_fidelity.{part}")
    except (PackageNotFoundError, ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        pytest.skip(f"torch-fidelity is not here: {error}")
    if Version(found) < Version(least):
        pytest.skip(f"torch-fidelity {found} is older than {least}")
    return module


@pytest.mark.parametrize("sets", SETS, ids=["many", "fewer than dimensions"])
def test_frechet(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    theirs = fidelity("metric_fid")
    statistics = [theirs.fid_features_to_statistics(x) for x in sets]
    value = theirs.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    parts = []
    for x in sets:
        parts.append(Moments(x.shape[1]))
        for some in x.split(37):
            parts[-1].update(some)
    assert frechet_distance(*sets) == pytest.approx(value, rel=1e-6)
    assert frechet_between(*parts) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("sets", SETS, ids=["many", "fewer than dimensions"])
def test_kernels(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    theirs = fidelity("metric_kid")
    whole = {"kid_subsets": 1, "kid_subset_size": len(sets[0]), "verbose": False}
    name = "kernel_inception_distance_mean"
    assert kid(*sets) == pytest.approx(theirs.kid_features_to_metric(*sets, **whole)[name], rel=1e-6)
    directions = [x / x.norm(dim=1, keepdim=True) for x in sets]
    value = theirs.kid_features_to_metric(*directions, **whole, kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)[name]
    assert cmmd(*sets) == pytest.approx(1000 * value, rel=1e-6)


@pytest.mark.parametrize("sets", SETS, ids=["many", "fewer than dimensions"])
def test_precision_and_recall(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    theirs = fidelity("metric_prc")
    found = theirs.prc_features_to_metric(*sets, prc_neighborhood=3, verbose=False)
    assert precision(*sets) == pytest.approx(found["precision"], abs=1e-6)
    assert recall(*sets) == pytest.approx(found["recall"], abs=1e-6)


def test_inception_is_asked_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own network without its weights, which would be downloaded: drawn at random."""
    module = fidelity("feature_extractor_inceptionv3", "0.3")
    network: Any = module.FeatureExtractorInceptionV3
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(network, "load_state_dict", lambda *_: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extractor = InceptionFeatures(batch_size=2)
    batch = images(3, 40, 56)
    features = extractor(batch)
    assert (features.dtype, tuple(features.shape), extractor.dim) == (torch.float64, (3, 2048), 2048)
    with torch.inference_mode():
        (expected,) = extractor._net(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()))
    assert not extractor._net.training and features.std(0).mean() > 0
    np.testing.assert_allclose(features.numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)
