"""For all tests: one thread (small tensors lose to threads), no network, caches and hub lookups in a temporary place."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Latent caches of tests never land in the user's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
