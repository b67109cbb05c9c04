"""What LCM asks of its networks and of the batch's randomness, and its loss spelled out once in numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, MEAN, STD, recorded, sd_table

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Kind, Prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.analytic import Analytic, Gaussian
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.randomness import StepRandom

INDICES = [*range(999, 0, -20), 0]  # the grid


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


def test_the_module_is_called_as_often_as_the_denoiser() -> None:
    student, teacher = Spy(sd_table()), Spy(sd_table())
    batch = Batch(torch.ones(2, 3, dtype=torch.float64), {}, {}, StepRandom(0, 0, range(2)))
    with recorded(student.module) as of_student, recorded(teacher.module) as of_teacher:
        LCM(LCMConfig(), student, teacher).training_step(batch)
    assert [grad for _, grad in of_student] == [True, False] and [grad for _, grad in of_teacher] == [False]


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


def test_guidance_is_drawn_for_each_sample_from_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Spy(sd_table())
    method = LCM(LCMConfig(w_min=3.0, w_max=5.0), student, student)
    drawn: list[Tensor] = []

    def guided(x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Prediction:
        drawn.append(w)
        return student(x_t, t, cond)

    monkeypatch.setattr(method, "guided", guided)
    for step in range(2):
        method.training_step(Batch(torch.zeros(1000, 3, dtype=torch.float64), {}, {}, StepRandom(0, step, range(1000))))
    first, second = drawn
    assert first.shape == (1000,) and not torch.equal(first, second)
    assert float(first.min()) >= 3.0 and float(first.max()) < 5.0
    assert_close(float(first.mean()), 4.0, rtol=0, atol=5 * 2 / math.sqrt(12 * 1000))
    assert_close(float(first.std()), 2 / math.sqrt(12), rtol=0.06, atol=0)


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
