import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD_ZTSNR = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def diffusers_table(config: dict[str, object]) -> Tensor:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler.from_config(config).alphas_cumprod


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_t_zero_is_clean_data(schedule: NoiseSchedule) -> None:
    assert schedule.alpha(times(0.0)).item() == 1.0
    assert schedule.sigma(times(0.0)).item() == 0.0


def test_flow_and_cosine_by_hand() -> None:
    t = times(0.0, 0.25, 1 / 3, 1.0)
    assert_close(Flow().alpha(t), times(1.0, 0.75, 2 / 3, 0.0), rtol=0, atol=1e-15)
    assert_close(Flow().sigma(t), t)
    assert_close(Cosine().alpha(t), times(1.0, math.cos(math.pi / 8), math.cos(math.pi / 6), 0.0), rtol=0, atol=1e-15)
    assert_close(Cosine().sigma(t), times(0.0, math.sin(math.pi / 8), 0.5, 1.0), rtol=0, atol=1e-15)
    assert Cosine().alpha(times(1.0)).item() == 0.0  # not 6e-17: "does not determine" must be noticed there


@pytest.mark.parametrize("config", [SD, SD_ZTSNR], ids=["sd", "ztsnr"])
def test_knots_are_the_diffusers_table_exactly(config: dict[str, object]) -> None:
    table = diffusers_table(config)
    schedule = Tabulated(table)
    knots = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    assert torch.equal(schedule.alpha(knots), table.double().sqrt())
    assert torch.equal(schedule.sigma(knots), (1 - table.double()).sqrt())
    assert torch.equal(schedule.alpha(knots).square().float(), table)
    assert schedule.zero_terminal_snr == (config is SD_ZTSNR)


def test_add_noise_is_that_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler.from_config(SD)
    schedule = Tabulated(scheduler.alphas_cumprod)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(6, 4, 3, 3, generator=g), torch.randn(6, 4, 3, 3, generator=g)
    index = torch.tensor([0, 1, 19, 500, 998, 999])
    expected = scheduler.add_noise(x0, eps, index)  # type: ignore[arg-type]
    assert_close(schedule.add_noise(x0, eps, schedule.time(index)), expected, rtol=0, atol=1e-6)


def test_angle_is_linear_between_knots(sd: Tabulated) -> None:
    for left in (0, 1, 399, 999):  # knot positions; 0 is clean data
        a, b = times(left / 1000), times((left + 1) / 1000)
        angles = [torch.atan2(sd.sigma(t), sd.alpha(t)) for t in (a, a + 0.25e-3, b)]
        assert_close(angles[1], 0.75 * angles[0] + 0.25 * angles[2], rtol=0, atol=1e-13)


def test_variance_preserving_monotone_and_continuous(sd: Tabulated) -> None:
    t = torch.linspace(0, 1, 5437, dtype=torch.float64)
    for schedule in (sd, Cosine(), Tabulated(diffusers_table(SD_ZTSNR))):
        assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)
        assert bool((schedule.alpha(t).diff() < 0).all())
        # no jump at a knot or anywhere else: the steepest slope of these is below 2 pi
        assert float(schedule.alpha(t).diff().abs().max()) < 2 * math.pi * float(t[1])


def test_rates_are_the_derivatives(schedule: NoiseSchedule) -> None:
    t, h = times(0.0304, 0.12345, 0.4021, 0.77777, 0.9502), 1e-6  # off the knots of all tables
    d_alpha, d_sigma = schedule.rates(t)
    assert_close(d_alpha, (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)
    assert_close(d_sigma, (schedule.sigma(t + h) - schedule.sigma(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)


def test_rates_on_a_knot_are_those_of_the_segment_after_it() -> None:
    schedule = Tabulated(torch.linspace(0.999, 0.001, 1000, dtype=torch.float64))
    knots = (torch.arange(999, dtype=torch.float64) + 1) / 1000  # k / N * N is below k for some k, above for others
    for on, after in zip(schedule.rates(knots), schedule.rates(knots + 1e-8), strict=True):
        assert_close(on, after, rtol=1e-4, atol=1e-4)


def test_rates_can_be_differentiated_and_ignore_the_grad_mode(schedule: NoiseSchedule) -> None:
    t, h = times(0.2021, 0.9003), 1e-5
    leaf = t.clone().requires_grad_(True)
    after, before = schedule.rates(t + h), schedule.rates(t - h)
    for rates in (schedule.rates(leaf), NoiseSchedule.rates(schedule, leaf)):
        second = torch.autograd.grad((rates[0] + 2 * rates[1] + 0 * leaf).sum(), leaf)[0]
        numeric = (after[0] + 2 * after[1] - before[0] - 2 * before[1]) / (2 * h)
        assert_close(second, numeric, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert_close(schedule.rates(leaf), schedule.rates(t))
    assert not schedule.rates(t)[0].requires_grad


def test_closed_rates_equal_the_inherited_automatic_ones(schedule: NoiseSchedule) -> None:
    t = times(0.0, 0.25, 0.333, 0.777, 1.0)
    assert_close(schedule.rates(t), NoiseSchedule.rates(schedule, t), rtol=0, atol=1e-12)


def test_alpha_and_sigma_are_differentiable_in_t(schedule: NoiseSchedule) -> None:
    for value, rate in zip((schedule.alpha, schedule.sigma), schedule.rates(times(0.25, 0.61, 1.0)), strict=True):
        t = times(0.25, 0.61, 1.0).requires_grad_(True)  # knots included: there the table's value replaces the cosine
        # `+ 0 t`: the VE alpha does not depend on t at all
        (gradient,) = torch.autograd.grad((value(t) + 0 * t).sum(), t)
        assert_close(gradient, rate)


def test_index_is_whole_on_the_knots(sd: Tabulated) -> None:
    k = torch.arange(-1, 1000, dtype=torch.float64)
    assert torch.equal(sd.index(sd.time(k)), k)  # 979 must not come back as 978.9999, or an int cast shifts it
    for steps in (3, 7, 50, 1000):
        grid = sd.grid(steps)
        whole = (sd.index(grid) - sd.index(grid).round()).abs() < 1e-6
        assert torch.equal(sd.index(grid)[whole], sd.index(grid)[whole].round())
    assert_close(sd.index(times(0.5005)), times(499.5))
    assert sd.time(torch.tensor([999])).item() == 1.0


def test_snr(schedule: NoiseSchedule) -> None:
    t = times(0.0, 0.3, 0.9)
    snr = schedule.snr(t)
    assert snr[0].item() == math.inf
    assert_close(snr[1:], schedule.alpha(t[1:]).square() / schedule.sigma(t[1:]).square())


def test_terminal_values_of_stable_diffusion(sd: Tabulated) -> None:
    table = sd.alpha(times(0.001, 1.0)).square()
    assert_close(table, times(0.99915, 0.00466), rtol=0, atol=5e-6)


def test_grid() -> None:
    assert_close(Flow().grid(4), times(1.0, 0.75, 0.5, 0.25, 0.0))
    with pytest.raises(ValueError, match="steps >= 1"):
        Flow().grid(0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
    + [(d, d) for d in (torch.float32, torch.float64)],
)
def test_factors_have_the_latents_shape_and_never_half_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    x0 = torch.ones(2, 3, 4, 5, dtype=dtype)
    alpha, sigma = Flow().at(times(0.25, 1.0), x0)
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == expected
    assert Flow().add_noise(x0, x0, times(0.25, 1.0)).dtype == expected


@pytest.mark.parametrize(
    "table", [[0.5], [0.5, 0.5], [0.4, 0.5], [1.0, 0.5], [0.5, -0.1], [[0.9, 0.8], [0.7, 0.6]]], ids=str
)
def test_tables_that_are_none(table: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Tabulated(torch.tensor(table))
