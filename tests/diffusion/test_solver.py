from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.diffusion.prediction import KINDS, Kind, Prediction, read, target
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated
from stepdistill.diffusion.solver import ddim, multistep_consistency, sample, x0_of_step

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
DIFFUSERS_NAME: dict[Kind, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
MEAN, STD = 2.0, 0.3


def perfect(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Prediction:
    """The posterior of data N(2, 0.3^2), written out."""
    alpha, sigma = schedule.at(t, x_t)
    variance = alpha**2 * STD**2 + sigma**2
    offset = x_t - alpha * MEAN
    return Prediction(x0=MEAN + alpha * STD**2 / variance * offset, eps=sigma / variance * offset)


@pytest.mark.parametrize("to_one", [False, True], ids=["ends at abar[0]", "ends at clean"])
@pytest.mark.parametrize(("kind", "ztsnr"), [("eps", False), ("v", False), ("x0", False), ("v", True)])
@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_ddim_is_the_scheduler_of_diffusers(kind: Kind, ztsnr: bool, to_one: bool, steps: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = SD | {"prediction_type": DIFFUSERS_NAME[kind], "set_alpha_to_one": to_one, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler.from_config(config | {"rescale_betas_zero_snr": ztsnr})
    schedule = Tabulated(scheduler.alphas_cumprod)
    # its table in float64, so that the comparison is exact and not one of float32 coefficients
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)

    g = torch.Generator().manual_seed(steps)
    ours = theirs = torch.randn(2, 3, dtype=torch.float64, generator=g)
    for n in scheduler.timesteps:
        output = torch.randn(2, 3, dtype=torch.float64, generator=g)
        theirs = scheduler.step(output, int(n), theirs).prev_sample
        following = int(n) - 1000 // steps
        s = schedule.time(torch.tensor([following if following >= 0 else (-1 if to_one else 0)]))
        t = schedule.time(n.reshape(1))
        ours = ddim(schedule, read(kind, schedule, output, ours, t), s)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_on_a_flow_is_the_euler_scheduler_of_diffusers(shift: float) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    g = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 3, generator=g)
    for i, n in enumerate(scheduler.timesteps):
        output = torch.randn(2, 3, generator=g)
        theirs = scheduler.step(output, n, theirs).prev_sample
        t, s = scheduler.sigmas[i : i + 2].double()
        ours = ddim(Flow(), read("flow", Flow(), output, ours, t.reshape(1)), s.reshape(1))
    assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_ddim_is_euler_on_a_flow(numbers: torch.Generator) -> None:
    x_t, velocity = (torch.randn(3, 2, dtype=torch.float64, generator=numbers) for _ in range(2))
    t, s = torch.tensor([1.0, 0.8, 0.3]).double(), torch.tensor([0.6, 0.0, 1.0]).double()
    stepped = ddim(Flow(), read("flow", Flow(), velocity, x_t, t), s)
    assert_close(stepped, x_t + (s - t)[:, None] * velocity, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_the_same_step(kind: Kind, schedule: NoiseSchedule, numbers: torch.Generator) -> None:
    x0, eps = (torch.randn(3, 2, dtype=torch.float64, generator=numbers) for _ in range(2))
    t, s = torch.tensor([0.9, 0.41, 0.2]).double(), torch.tensor([0.5, 0.05, 0.9]).double()
    x_t = schedule.add_noise(x0, eps, t)
    prediction = read(kind, schedule, target(kind, schedule, x0, eps, t), x_t, t)
    assert_close(ddim(schedule, prediction, s), schedule.add_noise(x0, eps, s), rtol=0, atol=1e-12)
    assert_close(ddim(schedule, prediction, t), x_t, rtol=0, atol=1e-12)  # no time passes, nothing moves


def test_one_step_that_lands_where_two_did(schedule: NoiseSchedule, numbers: torch.Generator) -> None:
    """The target of progressive distillation (arXiv 2202.00512, appendix G): DDIM to s with it gives z_s back."""
    z_t, z_s = (torch.randn(4, 2, dtype=torch.float64, generator=numbers) for _ in range(2))
    t, s = torch.full((4,), 0.8).double(), torch.full((4,), 0.35).double()
    (a_t, s_t), (a_s, s_s) = schedule.at(t, z_t), schedule.at(s, z_t)
    x_target = (z_s - s_s / s_t * z_t) / (a_s - s_s / s_t * a_t)
    assert_close(ddim(schedule, read("x0", schedule, x_target, z_t, t), s), z_s, rtol=0, atol=1e-14)


def test_the_x0_of_a_step_gives_the_step_back(schedule: NoiseSchedule, numbers: torch.Generator) -> None:
    x_t, x_s = (torch.randn(5, 2, dtype=torch.float64, generator=numbers) for _ in range(2))
    t, s = torch.tensor([1.0, 1.0, 0.8, 0.5, 0.25]).double(), torch.tensor([0.75, 0.0, 0.35, 0.25, 0.0]).double()
    x0 = x0_of_step(schedule, x_t, t, x_s, s)
    assert_close(ddim(schedule, read("x0", schedule, x0, x_t, t), s), x_s, rtol=0, atol=1e-12)
    at_the_end = schedule.alpha(torch.zeros(1).double()) * x0[[1, 4]]
    assert_close(at_the_end, x_s[[1, 4]], rtol=0, atol=0)
    if isinstance(schedule, Flow):
        assert_close((x_t - x0) / t[:, None], (x_s - x_t) / (s - t)[:, None], rtol=0, atol=1e-12)
    half, one = (v.expand(5) for v in torch.tensor([0.5, 1.0]).double())
    for before, after in ((half, half), (half, one)):
        with pytest.raises(ValueError, match=r"s < t, got t = \[0.5"):
            x0_of_step(schedule, x_t, before, x_s, after)
    assert x0_of_step(schedule, x_t.half(), t, x_s.half(), s).dtype == torch.float32


def test_steps_to_the_ends_ask_only_for_what_they_need() -> None:
    x, half = torch.ones(2, 1, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    zero, one = torch.zeros_like(half), torch.ones_like(half)
    # eps is undetermined for an x0 output at t = 0, x0 for an eps output at t = 1
    assert_close(ddim(Flow(), read("x0", Flow(), 3 * x, x, zero), zero), 3 * x)
    assert_close(ddim(Flow(), read("eps", Flow(), 3 * x, x, one), one), 3 * x)
    with pytest.raises(ValueError, match="does not determine"):
        ddim(Flow(), read("eps", Flow(), 3 * x, x, one), half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, t = torch.ones(2, 1, dtype=dtype), torch.full((2,), 0.5, dtype=torch.float64)
    assert ddim(Flow(), read("v", Flow(), x, x, t), 0.5 * t).dtype == torch.promote_types(dtype, torch.float32)


def w2_squared(schedule: Tabulated, grid: Tensor) -> tuple[float, float]:
    """(W2^2 to the data, mean) of DDIM's samples from N(0, 1): the map is affine, so two points tell all of it."""
    ends = sample(lambda x, t: perfect(schedule, x, t), schedule, torch.tensor([0.0, 1.0], dtype=torch.float64), grid)
    mean, std = float(ends[0]), float(ends[1] - ends[0])
    return (mean - MEAN) ** 2 + (std - STD) ** 2, mean


@pytest.mark.parametrize(
    ("steps", "to_first_level", "to_clean"),
    [(1, 0.0701, 0.0863), (2, 0.0475, 0.0605), (4, 0.0257, 0.0343), (8, 0.0118, 0.0167), (50, 0.0021, 0.0025)],
)
def test_steps_versus_quality_on_the_stable_diffusion_table(
    steps: int, to_first_level: float, to_clean: float, sd: Tabulated
) -> None:
    levels = torch.from_numpy(np.linspace(999, 0, steps + 1).round())
    w2, mean = w2_squared(sd, sd.time(levels))
    assert_close(w2, to_first_level, rtol=0, atol=5.5e-5)
    assert_close(w2_squared(sd, sd.grid(steps))[0], to_clean, rtol=0, atol=5.5e-5)
    if steps == 50:
        assert_close(mean, 1.9614, rtol=0, atol=2e-4)  # the leak at the terminal level: 2 is never reached


def test_trailing_grid_against_numpy(sd: Tabulated) -> None:
    """The same curve on Diffusers' trailing timesteps, from a loop over the table that shares no code with ours."""
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for steps in (1, 4, 50):
        levels = [999 - i * (1000 // steps) for i in range(steps)] + [0]
        mean, std = 0.0, 1.0
        for n, m in pairwise(levels):
            (a_t, a_s), (s_t, s_s) = np.sqrt(table[[n, m]]), np.sqrt(1 - table[[n, m]])
            k = (a_s * a_t * STD**2 + s_s * s_t) / (table[n] * STD**2 + 1 - table[n])
            mean, std = a_s * MEAN + k * (mean - a_t * MEAN), k * std
        w2, our_mean = w2_squared(sd, sd.time(torch.tensor(levels)))
        assert_close((w2, our_mean), ((mean - MEAN) ** 2 + (std - STD) ** 2, mean), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule_", [Flow(), Cosine()], ids=["flow", "cosine"])
def test_first_order_convergence_to_the_exact_map(schedule_: NoiseSchedule) -> None:
    x = torch.tensor([-0.7, 0.8], dtype=torch.float64)
    exact = MEAN + STD * x  # all of N(0, 1) at t = 1 is noise on these schedules
    errors = [
        float((sample(lambda x, t: perfect(schedule_, x, t), schedule_, x, schedule_.grid(n)) - exact).abs().max())
        for n in (100, 200, 400)
    ]
    assert errors[2] < 5e-3
    assert_close((errors[0] / errors[1], errors[1] / errors[2]), (2.0, 2.0), rtol=0.06, atol=0)


def test_a_straight_flow_needs_one_step() -> None:
    """After one exact reflow, x0 = 2 + 0.3 eps: the velocity is constant along the path (arXiv 2209.03003)."""

    def straight(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = Flow().at(t, x_t)
        eps = (x_t - alpha * MEAN) / (alpha * STD + sigma)
        return Prediction(x0=MEAN + STD * eps, eps=eps)

    x = torch.tensor([-1.2, 0.1, 0.8], dtype=torch.float64)
    for steps in (1, 2, 7):
        assert_close(sample(straight, Flow(), x, Flow().grid(steps)), MEAN + STD * x, rtol=0, atol=1e-14)


def test_sample_visits_the_grid_in_order() -> None:
    seen: list[list[float]] = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        seen.append(t.tolist())
        return Prediction(x0=x_t, eps=x_t)

    sample(denoise, Flow(), torch.ones(2, 1), Flow().grid(4))
    assert seen == [[t, t] for t in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize("grid", [[1.0], [0.0, 1.0], [1.0, 1.0], [[1.0, 0.0]]], ids=str)
def test_grids_that_are_none(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        sample(lambda x, t: Prediction(x, x), Flow(), torch.ones(1, 1), torch.tensor(grid))


def test_multistep_consistency_by_hand() -> None:
    times = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    seen: list[float] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return 2 * x_t + 1

    out = multistep_consistency(
        denoise, Flow(), torch.ones(1, 1, dtype=torch.float64), times, lambda i: torch.full((1, 1), 10.0 * i)
    )
    # 3 -> .5 * 3 + .5 * 10 = 6.5 -> 14 -> .75 * 14 + .25 * 20 = 15.5 -> 32
    assert out.item() == 32.0
    assert seen == times.tolist()
