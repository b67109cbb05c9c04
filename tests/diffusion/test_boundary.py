import pytest
import torch
from torch.testing import assert_close

from stepdistill.diffusion.boundary import lcm_scalings


@pytest.mark.parametrize("settings", [{}, {"timestep_scaling": 3.0}], ids=["defaults", "other"])
def test_scalings_are_those_of_the_lcm_scheduler(settings: dict[str, float]) -> None:
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    scheduler = LCMScheduler.from_config(settings)
    scheduler.set_timesteps(4)  # it sets sigma_data there
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(n) for n in range(1000)]
    c_skip, c_out = lcm_scalings(torch.arange(1000), **settings)
    expected = torch.tensor(theirs, dtype=torch.float64)
    assert_close(c_skip, expected[:, 0], rtol=1e-12, atol=0)
    assert_close(c_out, expected[:, 1], rtol=1e-12, atol=0)


def test_identity_at_the_boundary() -> None:
    c_skip, c_out = lcm_scalings(torch.tensor([0.0, -1.0]))  # -1 is clean data: t = 0
    assert c_skip.tolist() == [1.0, 1.0]
    assert c_out.tolist() == [0.0, 0.0]


def test_by_hand() -> None:
    c_skip, c_out = lcm_scalings(torch.tensor([3]), timestep_scaling=0.25, sigma_data=1.0)  # k n = 3 / 4
    assert_close((c_skip.item(), c_out.item()), (16 / 25, 3 / 5))
    c_skip, c_out = lcm_scalings(torch.tensor([2]), timestep_scaling=1.0, sigma_data=1.5)  # k n = 2: 3-4-5
    assert_close((c_skip.item(), c_out.item()), (9 / 25, 4 / 5))  # no factor sigma_data in c_out
    assert_close(sum(v.item() for v in lcm_scalings(torch.tensor([999]))), 1.0, rtol=0, atol=1e-6)
