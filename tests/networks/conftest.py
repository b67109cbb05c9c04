from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder; tests don't write into it."""
    return tiny_pipeline(tmp_path_factory.mktemp("base"))
