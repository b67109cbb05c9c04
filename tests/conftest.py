"""For all tests: one thread (small tensors lose to threads), no network, caches in a temporary place, signals as they were."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

from stepdistill.training.stopping import Stop

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Latent caches of tests never land in the user's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> None:
    """What the libraries made when they were imported is left out of all collections: most of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """SIGINT is not ignored, as in a shell's background job, and each test gives back the signals that its Trainer took."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if Stop._installed is not None:
        Stop._installed.close()
    signal.signal(signal.SIGINT, before)
