"""LCM against the closed form: on Gaussian data its fixed point is a product of DDIM multipliers, on every schedule."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, MEAN, STD, options, recorded, sd_table

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Kind, Prediction
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule
from stepdistill.errors import InputError
from stepdistill.families.analytic import Analytic, Gaussian, LinearStudent, TwoClass
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

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


def test_guidance_is_drawn_for_each_sample_from_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    student = FixedPoint("sd", "eps", lambda cond: torch.zeros(1, 1, dtype=torch.float64))
    method = LCM(LCMConfig(w_min=3.0, w_max=5.0), student, TwoClass(MEANS, STD, student.schedule))
    drawn: list[Tensor] = []

    def guided(x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Prediction:
        drawn.append(w)
        return method.teacher(x_t, t, cond)

    monkeypatch.setattr(method, "guided", guided)
    for step in range(2):
        label = torch.zeros(1000, dtype=torch.int64)
        rng = StepRandom(0, step, range(1000))
        x0 = torch.zeros(1000, 1, dtype=torch.float64)
        method.training_step(Batch(x0, {"label": label}, {"label": label}, rng))
    first, second = drawn
    assert first.shape == (1000,) and not torch.equal(first, second)
    assert float(first.min()) >= 3.0 and float(first.max()) < 5.0
    assert_close(float(first.mean()), 4.0, rtol=0, atol=5 * 2 / math.sqrt(12 * 1000))
    assert_close(float(first.std()), 2 / math.sqrt(12), rtol=0.06, atol=0)


class Spy(Denoiser):
    """A network of no consequence that keeps what it was asked."""

    def __init__(self, schedule: NoiseSchedule, kind: Kind = "eps") -> None:
        super().__init__(nn.Linear(3, 3).double(), schedule, kind)
        self.calls: list[tuple[Tensor, Tensor, Cond, bool]] = []

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x_t.detach().clone(), t, cond, torch.is_grad_enabled()))
        return self.net(x_t)


def spied(batch_size: int = 8, *, guided: bool = True) -> tuple[Spy, Spy, Batch]:
    student, teacher = Spy(sd_table()), Spy(sd_table())
    x0 = MEAN + STD * torch.randn(batch_size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = {"text": torch.ones(batch_size, 1)}
    batch = Batch(x0, cond, {"text": torch.zeros(batch_size, 1)} if guided else {}, StepRandom(0, 0, range(batch_size)))
    LCM(LCMConfig(), student, teacher).training_step(batch)
    return student, teacher, batch


def test_a_step_costs_one_teacher_forward_and_two_of_the_student() -> None:
    student, teacher, _ = spied()
    assert [(len(x), grad) for x, _, _, grad in student.calls] == [(8, True), (8, False)]
    assert [(len(x), grad) for x, _, _, grad in teacher.calls] == [(16, False)]
    (x, t, cond, _) = teacher.calls[0]
    assert_close(x[:8], x[8:], **EXACT)
    assert_close(t[:8], t[8:], **EXACT)
    assert cond["text"].flatten().tolist() == [1.0] * 8 + [0.0] * 8
    assert all(c["text"].tolist() == [[1.0]] * 8 for _, _, c, _ in student.calls)
    student, teacher, _ = spied(guided=False)
    assert [len(x) for x, *_ in student.calls] == [8, 8] and [len(x) for x, *_ in teacher.calls] == [8]


def test_the_target_stands_one_grid_step_further_on() -> None:
    student, teacher, _ = spied(64)
    t, s = (call[1] for call in student.calls)
    assert_close(t, teacher.calls[0][1][:64], **EXACT)
    index = {float(round(1000 * float(u) - 1)) for u in t}
    assert index <= set(INDICES[:-1]) and len(index) > 25  # uniform: 64 draws of 50
    following = dict(zip(INDICES, INDICES[1:], strict=False))
    assert [following[round(1000 * float(u) - 1)] for u in t] == [round(1000 * float(u) - 1) for u in s]


def test_the_noise_is_standard_normal_and_independent_of_the_data() -> None:
    student, _, batch = spied(4000)
    x_t, t = student.calls[0][:2]
    schedule = student.schedule
    eps = (x_t - schedule.alpha(t)[:, None] * batch.data()) / schedule.sigma(t)[:, None]
    n = eps.numel()
    assert abs(float(eps.mean())) < 5 / math.sqrt(n) and abs(float(eps.var()) - 1) < 5 * math.sqrt(2 / n)
    for other in (batch.data() - MEAN, t[:, None].expand_as(eps)):
        correlation = torch.corrcoef(torch.stack([eps.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(n)
    # three elements of a sample are three draws
    assert float(torch.corrcoef(eps.T).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(len(eps))


def test_time_guidance_and_noise_are_separate_draws() -> None:
    class Told(StepRandom):
        def __init__(self) -> None:
            super().__init__(0, 0, range(4))
            self.streams: list[str] = []

        def _generators(self, stream: str) -> Any:
            self.streams.append(stream)
            return super()._generators(stream)

    student, rng = Spy(sd_table()), Told()
    LCM(LCMConfig(), student, student).training_step(Batch(torch.ones(4, 3, dtype=torch.float64), {}, {}, rng))
    assert len(rng.streams) == len(set(rng.streams)) == 3  # two draws from one stream are the same numbers


def test_the_loss_by_hand_at_one_index() -> None:
    """Everything spelled out once in numbers, so that no constant can move."""
    student, teacher, batch = spied(1)
    config = LCMConfig()
    assert (config.huber_c, config.timestep_scaling, config.sigma_data, config.num_ddim_timesteps) == (
        0.001,
        10.0,
        0.5,
        50,
    )
    w = 5.0 + 10.0 * float(batch.rng.uniform("guidance"))
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)

    def f(x: Tensor, n: int) -> Tensor:
        x0 = (x - (1 - abar[n]).sqrt() * student.module(x)) / abar[n].sqrt()
        return 0.25 / ((10 * n) ** 2 + 0.25) * x + 10 * n / math.sqrt((10 * n) ** 2 + 0.25) * x0

    n, m = (round(1000 * float(t) - 1) for _, t, *_ in student.calls)
    x_t = student.calls[0][0]
    eps = (1 + w) * teacher.module(x_t) - w * teacher.module(x_t)  # this teacher does not look at its prompt
    x_s = abar[m].sqrt() * (x_t - (1 - abar[n]).sqrt() * eps) / abar[n].sqrt() + (1 - abar[m]).sqrt() * eps
    d = f(x_t, n) - f(x_s, m)
    for loss_type, value in (("huber", ((d**2 + 1e-6).sqrt() - 1e-3).mean()), ("l2", (d**2).mean())):
        losses = LCM(LCMConfig(loss_type=loss_type), student, teacher).training_step(batch)
        assert_close(losses.terms["consistency"], value, rtol=1e-9, atol=0)
        assert losses.count == 1


def linear(method_grid: Tensor, schedule: NoiseSchedule, kind: Kind = "x0") -> LinearStudent:
    student = LinearStudent(method_grid, schedule, kind)
    student.module.double()
    return student


def test_the_gradient_flows_through_the_jump_alone() -> None:
    schedule = sd_table()
    teacher = Gaussian(MEAN, STD, schedule, "x0")
    grid = torch.tensor(INDICES, dtype=torch.float64).add(1).div(1000)
    student = linear(grid, schedule).imitate(teacher)
    one = gaussian_batch()
    batch = Batch(one.data()[:1], {}, {}, StepRandom(0, 3, [0]))
    LCM(LCMConfig(), student, teacher).training_step(batch).total.backward()
    moved = student.module.weight.grad.nonzero().flatten().tolist()
    k = int(batch.rng.integers("time", 0, 50))
    assert moved == [k], "the entry of the target must have no gradient"


class Rows:
    """Fresh samples of a Gaussian, in float64."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return 4096

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        noise = rng.normal("data", (32,), torch.float64)
        return Batch(self.mean + self.std * noise, {}, {}, rng)


def reached(
    folder: Path, data: tuple[float, float], points: int, kind: Kind, steps: int, lr: float, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, width) of one-step samples from each grid point, [2, points]: trained, of the fixed point, at the start."""
    schedule = sd_table()
    teacher = Gaussian(*data, schedule, kind)
    config = LCMConfig(num_ddim_timesteps=points)
    grid = LCM(config, teacher, teacher).grid
    student = linear(grid, schedule, kind).imitate(teacher)  # as LoRA does, it starts as the teacher
    method = LCM(config, student, teacher)
    mean, width = (schedule.alpha(grid) * data[0])[:-1, None], teacher.variance(grid).sqrt()[:-1, None]

    @torch.no_grad()
    def moments() -> Tensor:
        low, high = (method.consistency(x, grid[:-1], student(x, grid[:-1], {})) for x in (mean - width, mean + width))
        return torch.cat([(low + high) / 2, (high - low) / 2], 1).T

    start = moments()
    train = options(
        max_train_steps=steps, learning_rate=lr, train_batch_size=batch, lr_scheduler="cosine", adam_weight_decay=0.0,
        adam_beta2=0.99, max_grad_norm=0.0, checkpointing_steps=10**6,
    )  # fmt: skip
    Trainer(train, folder).fit(method, Rows(*data))
    product = teacher.ddim_multiplier(grid[:-1], grid[1:]).flip(0).cumprod(0).flip(0)
    truth = torch.stack([(schedule.alpha(grid[-1:]) * data[0]).expand(points), product * width[:, 0]])
    return moments(), truth, start


def test_training_reaches_the_fixed_point_within_one_percent(tmp_path: Path) -> None:
    got, truth, start = reached(tmp_path, (MEAN, STD), points=5, kind="x0", steps=400, lr=0.03, batch=16)
    assert float((start[1] / truth[1]).min()) < 0.1, "it starts as the teacher, whose one step is a blur"
    assert_close(got, truth, rtol=0.01, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_training_on_the_full_grid_reaches_the_fixed_point_within_one_percent(tmp_path: Path, kind: Kind) -> None:
    got, truth, start = reached(tmp_path, (1.0, STD), points=50, kind=kind, steps=6000, lr=0.005, batch=50)
    assert float((start[1] / truth[1]).min()) < 0.1
    assert_close(got, truth, rtol=0.01, atol=0)


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


class Affine(Denoiser):
    """One linear layer, to be adapted."""

    lora_targets = ("0",)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t)


def test_with_lora_the_target_has_adapters_on_and_the_teacher_off() -> None:
    base = Affine(nn.Sequential(nn.Linear(3, 3)), sd_table(), "eps")
    student = base.with_lora(LoraSpec(2, 2.0, ("0",)))
    method = LCM(LCMConfig(), student, base)
    for parameter in student.trainable():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    active: list[tuple[str | None, int, bool]] = []
    base.module.register_forward_pre_hook(
        lambda _, x: active.append((base.adapters.current, len(x[0]), torch.is_grad_enabled()))
    )
    text = torch.ones(4, 1)
    batch = Batch(torch.ones(4, 3), {"text": text}, {"text": 0 * text}, StepRandom(0, 0, range(4)))
    method.training_step(batch).total.backward()
    assert active == [("student", 4, True), (None, 8, False), ("student", 4, False)]
    assert base.trainable() == [] and all(p.grad is not None for p in student.trainable())
    assert all(p.grad is None for n, p in base.module.named_parameters() if "lora" not in n)


def test_a_student_of_another_kind_than_its_teacher() -> None:
    student = FixedPoint("sd", "v")
    method = LCM(LCMConfig(), student, Gaussian(MEAN, STD, student.schedule, "eps"))
    assert abs(float(method.training_step(gaussian_batch()).total)) < 1e-12


def test_gradients_reach_a_float32_student_in_every_kind() -> None:
    for kind in ("eps", "v", "x0"):
        student = Spy(sd_table(), kind)
        student.module.float()
        student.calls.clear()
        batch = Batch(torch.ones(4, 3), {}, {}, StepRandom(0, 0, range(4)))
        teacher: Analytic = Gaussian(MEAN, STD, student.schedule, kind)
        losses = LCM(LCMConfig(), student, teacher).training_step(batch)
        losses.total.backward()
        assert losses.total.dtype == torch.float32 and float(student.module.weight.grad.norm()) > 0


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


def test_the_module_is_called_as_often_as_the_denoiser() -> None:
    student, teacher = Spy(sd_table()), Spy(sd_table())
    batch = Batch(torch.ones(2, 3, dtype=torch.float64), {}, {}, StepRandom(0, 0, range(2)))
    with recorded(student.module) as of_student, recorded(teacher.module) as of_teacher:
        LCM(LCMConfig(), student, teacher).training_step(batch)
    assert [grad for _, grad in of_student] == [True, False] and [grad for _, grad in of_teacher] == [False]
