"""The schedules that floor 0 is tested on: one of each sort, and a variance-exploding one that only tests have."""

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated


class VarianceExploding(NoiseSchedule):
    """alpha = 1, sigma = 6 t^2: no bound on the noise, and an alpha that does not depend on t."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return 6.0 * t.square()


def stable_diffusion_table() -> Tensor:
    """alphas_cumprod of SD 1.x / 2.x ("scaled_linear"), in float64."""
    return torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


SCHEDULES: dict[str, NoiseSchedule] = {
    "sd": Tabulated(stable_diffusion_table()),
    "short table to zero": Tabulated(torch.tensor([0.9, 0.6, 0.25, 0.0], dtype=torch.float64)),
    "flow": Flow(),
    "cosine": Cosine(),
    "ve": VarianceExploding(),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]


@pytest.fixture(scope="session")
def sd() -> Tabulated:
    return Tabulated(stable_diffusion_table())


@pytest.fixture
def numbers() -> torch.Generator:
    return torch.Generator().manual_seed(7)
