"""For all tests: one thread (small tensors lose to threads), no network, caches in a temporary place, signals as they were."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import sys
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


@pytest.fixture(scope="session")
def imported() -> list[int]:
    """How many modules there were when the collector last looked at them all."""
    return [0]


@pytest.fixture(autouse=True)
def little_to_collect(imported: list[int]) -> None:
    """What libraries make when they are imported is left out of later collections: most of their time."""
    if len(sys.modules) > imported[0] + 100:
        gc.collect()
        gc.freeze()
        imported[0] = len(sys.modules)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """SIGINT is not ignored, as in a shell's background job, and each test gives back the signals that its Trainer took."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if Stop._installed is not None:
        Stop._installed.close()
    signal.signal(signal.SIGINT, before)
