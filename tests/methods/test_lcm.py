"""LCM against the closed form: on Gaussian data its fixed point is a product of DDIM multipliers, on every schedule."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, MEAN, STD, sd_table

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Kind, Prediction
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, TwoClass
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import StepRandom

INDICES = [*range(999, 0, -20), 0]  # 999, 979, ..., 19, then the end of the grid


def path(name: str) -> tuple[NoiseSchedule, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A schedule, and by hand (not through our code) its times, alpha, sigma, c_skip and c_out at the 51 grid points."""
    ones = torch.ones(51, dtype=torch.float64)
    if name == "sd":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        level = torch.tensor(INDICES)
        abar = torch.cumprod(1 - betas, 0)[level]
        scaled = 10.0 * level.double()
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return sd_table(), (level.double() + 1) / 1000, abar.sqrt(), (1 - abar).sqrt(), c_skip, c_out
    t = torch.arange(50, -1, -1, dtype=torch.float64) / 50
    end = torch.arange(51) == 50
    c_skip, c_out = torch.where(end, ones, 0.0), torch.where(end, 0.0, ones)
    if name == "flow":
        return Flow(), t, 1 - t, t, c_skip, c_out
    return Cosine(), t, torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t), c_skip, c_out


class FixedPoint(Denoiser):
    """The network whose consistency function is the teacher's chain of DDIM steps: end_mean + P (x - alpha m).

    Args:
        mean: cond -> [B, 1], the mean of the data that guidance leads to.
    """

    def __init__(self, name: str, kind: Kind, mean: Callable[[Cond], Tensor] | None = None, std: float = STD) -> None:
        schedule, self.times, self.alpha, self.sigma, self.c_skip, self.c_out = path(name)
        super().__init__(nn.Identity(), schedule, kind)
        a, b = self.alpha, self.sigma
        step = (a[1:] * a[:-1] * std**2 + b[1:] * b[:-1]) / (a[:-1] ** 2 * std**2 + b[:-1] ** 2)
        self.product = torch.cat([step.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
        self.mean = mean or (lambda cond: torch.full((1, 1), MEAN, dtype=torch.float64))

    def jump(self, x: Tensor, k: Tensor, cond: Cond) -> Tensor:
        """Where the chain of DDIM steps takes x [B, D] from grid point k [B]."""
        mean = self.mean(cond)
        return self.alpha[-1] * mean + self.product[k][:, None] * (x - self.alpha[k][:, None] * mean)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        distance, k = (t[:, None] - self.times).abs().min(1)
        if float(distance.max()) > 1e-9:
            raise ValueError(f"asked for {t.tolist()}, off the grid that was promised")
        a, b, skip, out = (v[k][:, None] for v in (self.alpha, self.sigma, self.c_skip, self.c_out))
        x0 = torch.where(out == 0, x_t, (self.jump(x_t, k, cond) - skip * x_t) / torch.where(out == 0, 1.0, out))
        eps = torch.where(b == 0, 0.0, (x_t - a * x0) / torch.where(b == 0, 1.0, b))
        return {"x0": x0, "eps": eps, "v": a * eps - b * x0, "flow": eps - x0}[self.predicts]


class EachPoint(StepRandom):
    """Randomness whose integers are 0, 1, 2, ...: with 50 samples, one for each step of the grid."""

    def integers(self, stream: str, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        assert high - low == len(self), "one sample for each step of the grid"
        return torch.arange(low, high)


def gaussian_batch(mean: float | Tensor = MEAN, cond: Cond | None = None, uncond: Cond | None = None) -> Batch:
    noise = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(mean + STD * noise, cond or {}, uncond or {}, EachPoint(0, 0, range(50)))


WELL_POSED: list[tuple[str, Kind]] = [
    ("sd", "eps"), ("sd", "v"), ("sd", "x0"),
    ("flow", "flow"), ("flow", "v"), ("flow", "x0"), ("cosine", "v"), ("cosine", "x0"),
]  # fmt: skip


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
@pytest.mark.parametrize(("name", "kind"), WELL_POSED)
def test_loss_is_zero_at_the_fixed_point_at_every_grid_index(name: str, kind: Kind, loss_type: str) -> None:
    student = FixedPoint(name, kind)
    method = LCM(LCMConfig(loss_type=loss_type), student, Gaussian(MEAN, STD, student.schedule, kind))
    # 50 samples, one at each index, no term negative: the mean bounds each of them
    assert abs(float(method.training_step(gaussian_batch()).total)) < 1e-12 / 50
    k = torch.arange(51)
    x = torch.linspace(-1.0, 3.0, 51, dtype=torch.float64)[:, None]
    f = method.consistency(x, student.times, student(x, student.times, {}))
    assert_close(f, student.jump(x, k, {}), rtol=0, atol=1e-10)
    # and it is a minimum: a student of the wrong width has a loss at each index that it can move
    wrong = LCM(LCMConfig(loss_type=loss_type), FixedPoint(name, kind, std=0.25), method.teacher)
    assert float(wrong.training_step(gaussian_batch()).total) > 1e-6


def test_the_number_it_converges_to_and_the_solver_bias_it_inherits() -> None:
    student = FixedPoint("sd", "eps")
    teacher = Gaussian(MEAN, STD, student.schedule)
    method = LCM(LCMConfig(), student, teacher)
    x, t = torch.full((1, 1), 0.8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert_close(float(method.consistency(x, t, student(x, t, {}))), 2.1825, rtol=0, atol=5e-5)
    end = torch.full((1,), 0.001, dtype=torch.float64)  # index 0
    assert_close(float(teacher.exact_map(x, t, end)), 2.1995, rtol=0, atol=5e-5)
    assert_close(method.grid * 1000 - 1, torch.tensor(INDICES, dtype=torch.float64), rtol=0, atol=1e-9)


MEANS, UNCOND = (2.0, -1.0), 0.4


@pytest.mark.parametrize(("name", "kind"), [("sd", "eps"), ("sd", "v"), ("flow", "flow"), ("cosine", "v")])
@pytest.mark.parametrize("w", [0.0, 7.5])
def test_guidance_moves_the_fixed_point_to_the_shifted_mean(name: str, kind: Kind, w: float) -> None:
    def mean(cond: Cond) -> Tensor:
        m_c = torch.tensor(MEANS, dtype=torch.float64)[cond["label"]]
        return (m_c + w * (m_c - UNCOND))[:, None]  # LCM's w, not Diffusers' guidance_scale

    student = FixedPoint(name, kind, mean)
    teacher = TwoClass(MEANS, STD, student.schedule, kind, uncond_mean=UNCOND)
    method = LCM(LCMConfig(w_min=w, w_max=w), student, teacher)
    cond = {"label": torch.arange(50) % 2}
    batch = gaussian_batch(mean(cond), cond, {"label": torch.full((50,), -1)})
    assert abs(float(method.training_step(batch).total)) < 1e-12
    off = LCM(LCMConfig(w_min=w + 1, w_max=w + 1), student, teacher)
    assert float(off.training_step(batch).total) > 1e-3


def test_a_target_from_the_teacher_would_be_the_blurry_lcm() -> None:
    """With adapters OFF in the target the fixed point is one DDIM step and the teacher's mean: all width is lost."""
    right = FixedPoint("sd", "x0")
    gaussian = Gaussian(MEAN, STD, right.schedule, "x0")
    a, b = right.alpha, right.sigma
    gain = a * STD**2 / (a**2 * STD**2 + b**2)
    step = right.product[:-1] / right.product[1:]

    class Blurry(FixedPoint):
        def jump(self, x: Tensor, k: Tensor, cond: Cond) -> Tensor:
            following = (k + 1).clamp(max=50)
            skip, out, slope = self.c_skip[following], self.c_out[following], gain[following]
            x_s = a[following][:, None] * MEAN + (step[k.clamp(max=49)])[:, None] * (x - a[k][:, None] * MEAN)
            x0 = MEAN + slope[:, None] * (x_s - a[following][:, None] * MEAN)
            return skip[:, None] * x_s + out[:, None] * x0

    def width(student: FixedPoint) -> float:
        """The standard deviation of one-step samples from the marginal at index 999."""
        deviation = (a[0] ** 2 * STD**2 + b[0] ** 2).sqrt()
        x = a[0] * MEAN + torch.stack([0 * deviation, deviation])[:, None]
        low, high = student.jump(x, torch.zeros(2, dtype=torch.int64), {})
        return float(high - low)

    assert_close(width(Blurry("sd", "x0")), 0.007, rtol=0, atol=5e-4)
    assert_close(width(right), 0.276, rtol=0, atol=5e-4)  # of .3: 50 steps of DDIM lose the rest
    blurry = LCM(LCMConfig(loss_type="l2"), Blurry("sd", "x0"), gaussian).training_step(gaussian_batch())
    assert (
        float(blurry.total) > 1e-5
    )  # where the right one has 1e-14: neighbours on the grid blur alike, so it is small


def test_a_student_of_another_kind_than_its_teacher() -> None:
    student = FixedPoint("sd", "v")
    method = LCM(LCMConfig(), student, Gaussian(MEAN, STD, student.schedule, "eps"))
    assert abs(float(method.training_step(gaussian_batch()).total)) < 1e-12


def test_the_boundary_is_the_identity() -> None:
    for name in ("sd", "flow", "cosine"):
        student = FixedPoint(name, "x0")
        method = LCM(LCMConfig(), student, student)
        x = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        end = method.grid[-1:]
        far_off = Prediction(x + 100.0, x)
        assert_close(method.consistency(x, end, far_off), x, **EXACT)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"w_min": 3.0, "w_max": 2.0}, "w_min"),
        ({"w_min": -1.0}, "w_min"),
        ({"num_ddim_timesteps": 1}, "num_ddim_timesteps"),
        ({"huber_c": 0.0}, "huber_c"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        LCMConfig(**options)


def test_a_grid_that_the_scheduler_would_not_sample_is_refused() -> None:
    teacher = Gaussian(MEAN, STD, sd_table())
    with pytest.raises(InputError, match="divide"):
        LCM(LCMConfig(num_ddim_timesteps=60), teacher, teacher)
