import pytest
import torch
from torch.testing import assert_close

from stepdistill.diffusion.schedule import Flow, Tabulated
from stepdistill.diffusion.timesteps import choice, from_grid, logit_normal, shift, trainable, uniform

U = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]


def test_uniform() -> None:
    assert_close(uniform(U), U)
    assert_close(uniform(torch.tensor([0.0, 0.25]), 0.2, 0.6), torch.tensor([0.2, 0.3], dtype=torch.float64))


def test_logit_normal_quantiles() -> None:
    z = torch.special.ndtri(U[1:])
    t = logit_normal(z, mean=0.7, std=1.3)
    assert_close((torch.logit(t) - 0.7) / 1.3, z, rtol=0, atol=1e-9)
    assert_close(t.median(), torch.sigmoid(torch.tensor(0.7, dtype=torch.float64)), rtol=0, atol=1e-4)
    assert logit_normal(torch.zeros(1)).item() == 0.5
    assert logit_normal(torch.zeros(1)).dtype == torch.float64


def test_every_grid_entry_is_equally_likely() -> None:
    grid = torch.tensor([1.0, 0.6, 0.3, 0.1])
    values, counts = from_grid(U, grid).unique(return_counts=True)
    assert_close(values, grid.double().flip(0))
    assert counts.tolist() == [2500] * 4
    last = torch.nextafter(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert (
        from_grid(torch.cat([torch.zeros(1, dtype=torch.float64), last]), grid).tolist()
        == grid.double()[[0, 3]].tolist()
    )
    assert_close(from_grid(torch.ones(1), grid).item(), grid.double()[3].item())  # a rounded-up float32 number


def test_a_choice_has_the_probabilities_it_is_given() -> None:
    counts = choice(U, torch.tensor([0, 0.125, 0, 0.625, 0.25, 0])).bincount(minlength=6)
    assert counts.tolist() == [0, 1250, 0, 6250, 2500, 0]
    assert choice(U, torch.tensor([3.0, 1.0])).bincount().tolist() == [7500, 2500]  # of any sum
    ends = torch.tensor([0.0, 1.0])  # a rounded-up float32 number
    assert choice(ends, torch.tensor([0.0, 0.5, 0.5, 0.0])).tolist() == [1, 2]


def test_shift_is_that_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas.double()
    assert_close(shift(plain, 3.0), sigmas, rtol=0, atol=1e-6)


def test_shift_multiplies_the_noise_to_signal_ratio() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for factor in (0.5, 1.0, 3.0):
        assert_close(Flow().snr(shift(t, factor)), Flow().snr(t) / factor**2)
    assert_close(shift(shift(t, 2.0), 3.0), shift(t, 6.0))
    assert_close(shift(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="shift > 0"):
        shift(t, 0.0)


def test_times_that_a_network_trains_at() -> None:
    table = Tabulated(torch.tensor([0.9, 0.6, 0.25, 0.0], dtype=torch.float64))
    times, counts = trainable(U, table).unique(return_counts=True)
    assert times.tolist() == [0.25, 0.5, 0.75, 1.0] and counts.tolist() == [2500] * 4
    assert_close(trainable(U, Flow())[1:], U[1:])
    assert float(trainable(U, Flow())[0]) == 1e-5
