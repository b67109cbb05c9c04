"""Progressive distillation against the closed form: on Gaussian data every rung is a product of DDIM multipliers."""

import math

import pytest
import torch
from ladders import batch, config
from torch import Tensor
from torch.testing import assert_close
from toys import MEAN, STD

from stepdistill.batch import Cond
from stepdistill.diffusion.prediction import Kind, read, target
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated
from stepdistill.diffusion.solver import ddim, sample
from stepdistill.families.analytic import Gaussian, LinearStudent, TwoClass
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.denoiser import Denoiser


def table(levels: int = 600, zero: bool = False) -> Tabulated:
    """Stable Diffusion's betas over so many levels, which 3 divides; its end moved to pure noise where `zero`."""
    abar = torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, levels, dtype=torch.float64) ** 2, 0)
    if zero:
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return Tabulated(abar)


SCHEDULES: dict[str, NoiseSchedule] = {
    "table": table(), "ztsnr": table(zero=True), "flow": Flow(), "cosine": Cosine()
}  # fmt: skip
POSED: list[tuple[str, Kind]] = [
    ("table", "eps"), ("table", "v"), ("table", "x0"), ("table", "flow"), ("ztsnr", "v"), ("ztsnr", "x0"),
    ("flow", "flow"), ("flow", "v"), ("flow", "x0"), ("cosine", "v"), ("cosine", "x0"),
]  # fmt: skip
STEPS = 10


def linear(
    schedule: NoiseSchedule, kind: Kind = "x0", steps: int = STEPS, shape: tuple[int, ...] = ()
) -> LinearStudent:
    student = LinearStudent(config((steps,), 2 * steps).grid(schedule, steps)[:-1], schedule, kind, shape)
    student.module.double()
    return student


def multipliers(schedule: NoiseSchedule, times: Tensor, std: float = STD) -> Tensor:
    """k of each DDIM step along `times`, by hand."""
    a, b = schedule.alpha(times), schedule.sigma(times)
    return (a[1:] * a[:-1] * std**2 + b[1:] * b[:-1]) / (a[:-1] ** 2 * std**2 + b[:-1] ** 2)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize(("name", "kind"), POSED)
def test_one_step_with_the_target_lands_where_k_steps_of_the_teacher_do(name: str, kind: Kind, k: int) -> None:
    schedule = SCHEDULES[name]
    method = Progressive(config((STEPS,), k * STEPS), linear(schedule, kind), Gaussian(MEAN, STD, schedule, kind))
    x_t, i = 2.0 * noise(STEPS, 3), torch.arange(STEPS)
    t, s = method.grid[:-1], method.grid[1:]
    x0 = method.wanted(x_t, i, {}, {}, torch.zeros(STEPS))
    fine = torch.arange(k * STEPS, -1, -1, dtype=torch.float64) / (k * STEPS)
    product = multipliers(schedule, fine).reshape(STEPS, k).prod(1)[:, None]
    a_t, a_s = schedule.alpha(t)[:, None], schedule.alpha(s)[:, None]
    z_s = a_s * MEAN + product * (x_t - a_t * MEAN)
    eps = (x_t - a_t * x0) / schedule.sigma(t)[:, None]
    said = read(kind, schedule, target(kind, schedule, x0, eps, t), x_t, t)
    assert_close(ddim(schedule, said, s), z_s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_is_no_opinion_of_the_teacher_but_their_average(name: str) -> None:
    """Each x0 that the teacher says on its way, weighted by what its step adds to alpha / sigma."""
    schedule, k = SCHEDULES[name], 3
    teacher = Gaussian(MEAN, STD, schedule, "x0")
    method = Progressive(config((STEPS,), k * STEPS), linear(schedule), teacher)
    x_t, i = 2.0 * noise(STEPS - 1, 3), torch.arange(STEPS - 1)  # but the last, whose alpha / sigma ends at infinity
    times = method.config.grid(schedule, k * STEPS)[k * i[:, None] + torch.arange(k + 1)]
    x, said = x_t, []
    for j in range(k):
        said.append(teacher(x, times[:, j], {}).x0)
        x = ddim(schedule, teacher(x, times[:, j], {}), times[:, j + 1])
    ratio = schedule.alpha(times) / schedule.sigma(times)
    weight = (ratio[:, 1:] - ratio[:, :-1]) / (ratio[:, -1:] - ratio[:, :1])
    average = (weight.T[:, :, None] * torch.stack(said)).sum(0)
    got = method.wanted(x_t, i, {}, {}, torch.zeros(len(i)))
    assert_close(got, average, rtol=1e-10, atol=1e-10)
    for opinion in said:  # the trap: the last one
        assert float((got - opinion).abs().amax(1).min()) > 1e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_step_ends_at_clean_data_with_the_last_x0_of_the_teacher(name: str) -> None:
    schedule = SCHEDULES[name]
    teacher = Gaussian(MEAN, STD, schedule, "x0")
    method = Progressive(config((STEPS,), 2 * STEPS), linear(schedule), teacher)
    assert float(method.grid[0]) == 1.0 and float(method.grid[-1]) == 0.0
    x_t, t, middle = noise(1, 3), method.grid[-2:-1], method.grid[-2:-1] / 2
    x = ddim(schedule, teacher(x_t, t, {}), middle)
    got = method.wanted(x_t, torch.tensor([STEPS - 1]), {}, {}, torch.zeros(1))
    assert_close(got, teacher(x, middle, {}).x0, rtol=0, atol=1e-12)
    if isinstance(schedule, Tabulated):  # the other rule, set_alpha_to_one=False, would make it another number
        to_abar = ddim(schedule, teacher(x, middle, {}), torch.full((1,), 1 / schedule.levels, dtype=torch.float64))
        assert float((got - to_abar).abs().max()) > 1e-3


def test_the_velocity_on_a_flow_is_the_slope_of_the_chord() -> None:
    teacher = Gaussian(MEAN, STD, Flow(), "flow")
    method = Progressive(config((4,), 12), linear(Flow(), "flow", 4), teacher)
    x_t, i = noise(4, 3), torch.arange(4)
    x0 = method.wanted(x_t, i, {}, {}, torch.zeros(4))
    t, s = method.grid[:-1, None], method.grid[1:, None]
    ends = torch.stack([sample(lambda x, u: teacher(x, u, {}), Flow(), x_t[j], torch.linspace(float(t[j]), float(s[j]), 4,
        dtype=torch.float64)) for j in range(4)])  # fmt: skip
    assert_close((x_t - x0) / t, (ends - x_t) / (s - t), rtol=0, atol=1e-12)


# -- the ladder's fixed point ------------------------------------------------------------------------------------------


def learn(method: Progressive, cond: Cond, uncond: Cond, w: float) -> None:
    """Solves this rung: the wanted x0 is affine in x_t, so two points determine what a linear student has to say."""
    student, steps = method.student, method.steps
    assert isinstance(student, LinearStudent)
    i, t = torch.arange(steps), method.grid[:-1]
    alpha, sigma = method.schedule.alpha(t), method.schedule.sigma(t)
    said = []
    for value in (0.0, 1.0):
        x_t = torch.full((steps,), value, dtype=torch.float64)
        x0 = method.wanted(x_t, i, cond, uncond, torch.full((steps,), w))
        said.append(target(student.predicts, method.schedule, x0, (x_t - alpha * x0) / sigma, t))
    at = (t[:, None] - student.grid).abs().argmin(1)
    with torch.no_grad():
        student.module.bias[at], student.module.weight[at] = said[0], said[1] - said[0]


LADDERS = [(40, (8, 4, 2, 1)), (20, (10, 5, 1)), (24, (8, 4, 2))]


@pytest.mark.parametrize(("teacher_steps", "rungs"), LADDERS)
@pytest.mark.parametrize(("name", "kind"), [p for p in POSED if p[1] != "eps"])
def test_the_whole_ladder_ends_at_the_product_of_the_first_teachers_steps(
    name: str, kind: Kind, teacher_steps: int, rungs: tuple[int, ...]
) -> None:
    schedule = SCHEDULES[name]
    teacher = Gaussian(MEAN, STD, schedule, kind)
    method = Progressive(config(rungs, teacher_steps), linear(schedule, kind, rungs[0]), teacher)
    climb(method, teacher_steps, rungs)


@pytest.mark.parametrize("name", ["table"])
def test_an_eps_student_down_to_eight_steps(name: str) -> None:
    schedule = SCHEDULES[name]
    method = Progressive(config((24, 8), 120), linear(schedule, "eps", 24), Gaussian(MEAN, STD, schedule, "eps"))
    climb(method, 120, (24, 8))


def climb(method: Progressive, teacher_steps: int, rungs: tuple[int, ...]) -> None:
    x = noise(5)
    truth = multipliers(method.schedule, torch.linspace(1, 0, teacher_steps + 1, dtype=torch.float64)).prod()
    wanted = MEAN + truth * (x - method.schedule.alpha(torch.ones(1, dtype=torch.float64)) * MEAN)
    for number, steps in enumerate(rungs):
        assert method.steps == steps and method.rung == number
        before = float(method.training_step(batch(64)).total.detach())
        learn(method, {}, {}, 0.0)
        assert float(method.training_step(batch(64)).total.detach()) < 1e-18 < 1e-7 < before
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        assert_close(sample(lambda x, t: method.student(x, t, {}), method.schedule, x, grid), wanted, rtol=0, atol=1e-8)
        assert method.next_round() == (number + 1 < len(rungs))


MEANS, UNCOND, W = (2.0, -1.0), 0.4, 2.5


@pytest.mark.parametrize(("name", "kind"), [("table", "v"), ("ztsnr", "v"), ("flow", "flow")])
def test_guidance_is_in_the_first_rung_and_not_twice(name: str, kind: Kind) -> None:
    schedule = SCHEDULES[name]
    teacher = TwoClass(MEANS, STD, schedule, kind, uncond_mean=UNCOND)
    method = Progressive(config((4, 2, 1), 20, w_min=W, w_max=W), linear(schedule, kind, 4), teacher)
    shifted = MEANS[1] + W * (MEANS[1] - UNCOND)
    truth = multipliers(schedule, torch.linspace(1, 0, 21, dtype=torch.float64)).prod()
    x = noise(5)
    wanted = shifted + truth * (x - schedule.alpha(torch.ones(1, dtype=torch.float64)) * shifted)
    for steps in (4, 2, 1):
        cond, uncond = {"label": torch.ones(steps).long()}, {"label": -torch.ones(steps).long()}
        learn(method, cond, uncond, W)
        grid = method.grid
        assert_close(sample(lambda x, t: method.student(x, t, {}), schedule, x, grid), wanted, rtol=0, atol=1e-8)
        method.next_round()


class Told(Denoiser):
    """The perfect network of a guided Gaussian: it is told the guidance_scale. Remembers what it is told."""

    takes_guidance = True

    def __init__(self, schedule: NoiseSchedule, kind: Kind) -> None:
        super().__init__(torch.nn.Linear(1, 1), schedule, kind)
        self.heard: list[Tensor] = []

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.heard.append(cond["guidance"])
        mean = 1.0 + (cond["guidance"] - 1.0)[:, None]
        a, b = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        x0 = mean + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t - a * mean)
        return target(self.predicts, self.schedule, x0, (x_t - a * x0) / b, t) + 0.0 * self.net.weight.sum()


@pytest.mark.parametrize("given", [True, False])
def test_student_and_teacher_are_told_the_same_guidance_of_its_range(given: bool) -> None:
    teacher, student = Told(table(), "v"), Told(table(), "v")
    method = Progressive(config((4,), 8, w_min=3.0, w_max=5.0), student, teacher if given else None)
    heard = method.teacher.heard = []
    one = batch(1000, cond={"label": torch.zeros(1000)}, uncond={"label": torch.ones(1000)})
    method.training_step(one)
    (said,) = student.heard[-1:]
    assert len(heard) == 2 and all(torch.equal(told, said) for told in heard)
    assert float(said.min()) >= 4.0 and float(said.max()) < 6.0  # guidance_scale = w + 1
    assert abs(float(said.mean()) - 5.0) < 5 * 2 / math.sqrt(12 * 1000)
    assert all(len(told) == 1000 for told in heard), "no second half for guidance that is in it already"


def test_a_student_that_is_told_learns_from_a_guided_teacher_that_is_not() -> None:
    guided = TwoClass((1.0, 0.0), STD, table(), "v", uncond_mean=0.0)  # 1 + w (1 - 0), as Told has it
    x_t, i, w = noise(30, 3), torch.arange(30), torch.linspace(1, 4, 30, dtype=torch.float64)
    cond, uncond = {"label": torch.zeros(30).long()}, {"label": -torch.ones(30).long()}
    got, wanted = (
        Progressive(config((30,), 60, w_min=1.0, w_max=4.0), Told(table(), "v"), teacher).wanted(
            x_t, i, cond, uncond, w
        )
        for teacher in (guided, Told(table(), "v"))
    )
    assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_guided_teacher_of_unconditional_data_is_plain() -> None:
    teacher = Gaussian(MEAN, STD, table(), "v")
    method = Progressive(config((4,), 8, w_min=W, w_max=W), linear(table(), "v", 4), teacher)
    x_t, i = noise(4, 3), torch.arange(4)
    plain = Progressive(config((4,), 8), linear(table(), "v", 4), teacher)
    got, wanted = (m.wanted(x_t, i, {}, {}, torch.full((4,), w)) for m, w in ((method, W), (plain, 0.0)))
    assert_close(got, wanted, rtol=0, atol=0)
