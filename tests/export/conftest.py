from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeApi
from tiny import tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    """The hub's client in this test."""
    fake = type("Fake", (FakeApi,), {"calls": [], "fails": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder; tests don't write into it."""
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder; tests don't write into it."""
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional DDPM folder; tests don't write into it."""
    return tiny_pixels(tmp_path_factory.mktemp("pixels"))
