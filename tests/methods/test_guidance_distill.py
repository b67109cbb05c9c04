"""Guidance distillation against the closed form: guidance on Gaussians of equal variance is a shift of the mean."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import Net, batch
from oracle import normal, opened
from students import inputs
from tiny import tiny_pipeline
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, STD, options, recorded, sd_table

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Kind, target
from stepdistill.diffusion.schedule import Flow, NoiseSchedule, Tabulated
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, TwoClass
from stepdistill.methods.guidance_distill import GuidanceDistill, GuidanceDistillConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec, StudentConfig
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

MEANS, UNCOND = (2.0, -1.0), 0.4
ZERO = Tabulated(torch.cat([sd_table().alpha(sd_table().grid(1000)[1:-1].flip(0)) ** 2, torch.zeros(1)]).double())
SCHEDULES: dict[str, NoiseSchedule] = {"sd": sd_table(), "ztsnr": ZERO, "flow": Flow()}
POSED: list[tuple[str, Kind]] = [("sd", "eps"), ("sd", "v"), ("sd", "x0"), ("ztsnr", "v"), ("flow", "flow")]


class Told(Denoiser):
    """The perfect network with guidance: it is told the guidance_scale, and knows N(m_c + w (m_c - m_u), s^2).

    Args:
        off: is added to the w it is told, which makes it wrong.
    """

    takes_guidance = True

    def __init__(self, schedule: NoiseSchedule, kind: Kind, off: float = 0.0) -> None:
        super().__init__(nn.Linear(1, 1), schedule, kind)
        self.off, self.heard = off, []

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.heard.append((t, cond["guidance"]))
        m = torch.tensor(MEANS, dtype=torch.float64)[cond["label"]]
        mean = (m + (cond["guidance"] - 1.0 + self.off) * (m - UNCOND))[:, None]
        a, b = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        x0 = mean + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t - a * mean)
        return target(self.predicts, self.schedule, x0, (x_t - a * x0) / b, t)


def teacher_of(name: str, kind: Kind) -> TwoClass:
    return TwoClass(MEANS, STD, SCHEDULES[name], kind, uncond_mean=UNCOND)


def labelled(size: int, step: int = 0) -> Batch:
    label = torch.arange(size) % 2
    mean = torch.tensor(MEANS, dtype=torch.float64)[label][:, None]
    return batch(size, step, mean, cond={"label": label}, uncond={"label": torch.full((size,), -1)})


def loss(method: GuidanceDistill, one: Batch) -> float:
    return float(method.training_step(one).total.detach())


@pytest.mark.parametrize("w", [(0.0, 0.0), (3.0, 3.0), (0.0, 14.0)])
@pytest.mark.parametrize(("name", "kind"), POSED)
def test_the_loss_is_zero_at_the_shifted_mean_and_nowhere_else(name: str, kind: Kind, w: tuple[float, float]) -> None:
    config, schedule = GuidanceDistillConfig(*w), SCHEDULES[name]
    right, teacher = Told(schedule, kind), teacher_of(name, kind)
    one = labelled(200)
    assert loss(GuidanceDistill(config, right, teacher), one) < 1e-16
    for off in (1.0, -1.0):  # guidance_scale taken for w, or w for guidance_scale
        assert loss(GuidanceDistill(config, Told(schedule, kind, off), teacher), one) > 1e-2


def test_one_w_for_a_student_that_is_not_told() -> None:
    teacher, w = teacher_of("sd", "v"), 2.5
    shifted = Gaussian(MEANS[0] + w * (MEANS[0] - UNCOND), STD, teacher.schedule, "v")
    one = batch(64, cond={"label": torch.zeros(64).long()}, uncond={"label": -torch.ones(64).long()})
    assert loss(GuidanceDistill(GuidanceDistillConfig(w, w), shifted, teacher), one) < 1e-16
    assert loss(GuidanceDistill(GuidanceDistillConfig(w + 1, w + 1), shifted, teacher), one) > 1e-2


@pytest.mark.parametrize("weighting", [None, "truncated_snr", "snr+1", "snr"])
@pytest.mark.parametrize("kind", ["v", "eps"])
def test_the_loss_by_hand(kind: Kind, weighting: Any) -> None:
    teacher = Net(kind=kind)
    teacher.module.double()
    student = teacher.full_student()
    student.module.double()[2].bias.data.add_(0.5)
    method = GuidanceDistill(GuidanceDistillConfig(1.0, 1.0, weighting), student, teacher)
    one = labelled(200)  # this teacher does not look at its labels, so guidance changes nothing
    index = torch.floor(one.rng.uniform("time") * 1000)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[index.long()]
    # the outputs differ by .5, and x0 by that times sigma (v) or sigma / alpha (eps)
    error = 0.25 * (1 - abar) / (1.0 if kind == "v" else abar)
    snr = abar / (1 - abar)
    by_name = {"truncated_snr": snr.clamp(min=1), "snr+1": snr + 1, "snr": snr}
    weight = by_name[weighting or {"v": "truncated_snr", "eps": "snr"}[kind]]
    losses = method.training_step(one)
    assert_close(losses.total, (weight * error).mean(), rtol=1e-6, atol=0)
    assert set(losses.terms) == {"distillation"} and losses.count == 200


def test_times_and_guidance_cover_their_ranges_and_the_student_alone_is_told() -> None:
    student, asked = Told(sd_table(), "v"), []

    class Asked(TwoClass):
        def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            asked.append(cond)
            return super().call(x_t, t, cond)

    method = GuidanceDistill(GuidanceDistillConfig(2.0, 6.0), student, Asked(MEANS, STD, sd_table(), "v"))
    size = 4000
    method.training_step(labelled(size))
    ((t, told),) = student.heard
    level = sd_table().index(t)
    assert_close(level, level.round(), rtol=0, atol=1e-9)
    assert float(level.min()) >= 0 and float(level.max()) <= 999
    assert abs(float(level.mean()) - 499.5) < 5 * 1000 / math.sqrt(12 * size)
    assert float(told.min()) >= 3.0 and float(told.max()) < 7.0  # guidance_scale = w + 1
    assert abs(float(told.mean()) - 5.0) < 5 * 4 / math.sqrt(12 * size)
    assert abs(float(torch.corrcoef(torch.stack([t, told]))[0, 1])) < 5 / math.sqrt(size)
    assert asked and all(set(cond) == {"label"} for cond in asked)
    flow = Told(Flow(), "flow")
    GuidanceDistill(GuidanceDistillConfig(), flow, teacher_of("flow", "flow")).training_step(labelled(size))
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert_close(torch.quantile(flow.heard[0][0], quantiles), quantiles, rtol=0, atol=0.04)


def test_a_step_costs_one_forward_of_the_teacher_on_both_halves_and_one_of_the_student() -> None:
    teacher = Net()
    student = teacher.full_student()
    one = labelled(8)
    one.x0 = one.data().float()
    with recorded(student.module) as of_student, recorded(teacher.module) as of_teacher:
        GuidanceDistill(GuidanceDistillConfig(), student, teacher).training_step(one).total.backward()
    assert [(len(x[0]), grad) for x, grad in of_student] == [(8, True)]
    assert [(len(x[0]), grad) for x, grad in of_teacher] == [(16, False)]
    x = of_teacher[0][0][0]
    assert_close(x[:8], x[8:], **EXACT)
    assert_close(x[:8], of_student[0][0][0], **EXACT)


def test_a_lora_learns_from_its_own_base() -> None:
    teacher = Net()
    student = teacher.with_lora(LoraSpec(2, 2.0, Net.lora_targets))
    method = GuidanceDistill(GuidanceDistillConfig(), student, teacher)
    for parameter in student.trainable():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    active: list[tuple[str | None, bool]] = []
    teacher.module.register_forward_pre_hook(
        lambda *_: active.append((student.adapters.current, torch.is_grad_enabled()))
    )
    one = labelled(8)
    one.x0 = one.data().float()
    method.training_step(one).total.backward()
    assert active == [(None, False), ("student", True)]
    assert all(p.grad is not None for p in student.trainable())
    assert method.networks() == {"student": student} and teacher.trainable() == []


def test_a_batch_in_parts_is_the_batch() -> None:
    teacher = Net()
    student = teacher.full_student()
    student.module[2].bias.data.add_(0.5)
    method = GuidanceDistill(GuidanceDistillConfig(), student, teacher)
    one = labelled(8)
    one.x0 = one.data().float()
    parts = [
        Batch(one.data()[i : i + 4], *({"label": c["label"][i : i + 4]} for c in (one.cond, one.uncond)),
              one.rng.slice(i, i + 4)) for i in (0, 4)
    ]  # fmt: skip
    assert_close(sum(loss(method, part) for part in parts) / 2, loss(method, one), rtol=1e-5, atol=0)


# -- on a UNet ---------------------------------------------------------------------------------------------------------


def test_at_the_first_step_the_student_is_its_teacher_whatever_it_is_told(tmp_path: Path) -> None:
    model = opened(tiny_pipeline(tmp_path / "v", prediction_type="v_prediction"))
    student = model.denoiser.student(StudentConfig(kind="full"), embed_guidance=True)
    x_t, t, cond = inputs()
    with torch.no_grad():
        wanted = model.denoiser.output(x_t, t, cond)
        for scale in (1.0, 4.0, 14.0):
            told = {**cond, "guidance": torch.full((2,), scale, dtype=torch.float64)}
            assert_close(student.output(x_t, t, told), wanted, **EXACT)
    cond = model.conditions(["a red circle", "b"])
    one = Batch(normal(2, 4, 4, 4), cond, model.uncond(cond), StepRandom(0, 0, range(2)))
    method = GuidanceDistill(GuidanceDistillConfig(2.0, 14.0), student, model.denoiser)
    with torch.no_grad():
        got = method.training_step(one).total
        t = (torch.floor(one.rng.uniform("time") * 1000) + 1) / 1000
        x_t = method.schedule.add_noise(one.data(), one.rng.normal("noise", (4, 4, 4)), t)
        gap = model.denoiser(x_t, t, one.cond).x0 - model.denoiser(x_t, t, one.uncond).x0
        w = 2.0 + 12.0 * one.rng.uniform("guidance")
        error = (
            w * gap.double().square().mean((1, 2, 3)).sqrt()
        ).square()  # all of the guidance is still to be learned
        wanted = (method.schedule.snr(t).clamp(min=1.0) * error).mean()
    assert_close(got.double(), wanted, rtol=1e-3, atol=0)
    assert float(wanted) > 1e-6
    method.training_step(one).total.backward()
    assert float(student.module.time_embedding.cond_proj.weight.grad.norm()) > 0


# -- through the trainer -----------------------------------------------------------------------------------------------

LEVELS = Tabulated(torch.tensor([0.9, 0.6, 0.25, 0.02], dtype=torch.float64))


class Affine(Denoiser):
    """At each level weight x + bias + slope w: all that a perfect student of Gaussians needs. It may be told w or not."""

    def __init__(self, told: bool) -> None:
        net = nn.ParameterList(nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(3))
        super().__init__(net, LEVELS, "x0")
        self.takes_guidance = told

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        weight, bias, slope = (p[(4 * t).round().long() - 1][:, None] for p in self.module)
        w = cond["guidance"][:, None] - 1.0 if self.takes_guidance else 0.0
        return weight * x_t + bias + slope * w


class OneClass:
    """Samples of the first class."""

    def __len__(self) -> int:
        return 512

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        label = torch.zeros(len(indices), dtype=torch.int64)
        x0 = 1.0 + 0.5 * rng.normal("data", (8,), torch.float64)
        return Batch(x0, {"label": label}, {"label": label - 1}, rng)


@pytest.mark.parametrize("told", [True, False])
def test_training_reaches_the_guided_teacher_within_one_percent(tmp_path: Path, told: bool) -> None:
    teacher = TwoClass((1.0, 0.0), 0.5, LEVELS, "x0", uncond_mean=0.5)
    student = Affine(told)
    config = GuidanceDistillConfig(1.0, 3.0) if told else GuidanceDistillConfig(2.0, 2.0)
    train = options(
        max_train_steps=300, learning_rate=0.1, adam_beta2=0.99, train_batch_size=16, adam_weight_decay=0.0,
        max_grad_norm=0.0, lr_scheduler="cosine",
    )  # fmt: skip
    Trainer(train, tmp_path).fit(GuidanceDistill(config, student, teacher), OneClass(), "guidance")
    t = torch.arange(1, 5, dtype=torch.float64) / 4
    with torch.no_grad():
        for w in (1.0, 2.0, 3.0) if told else (2.0,):
            truth = teacher.guided(0, w)
            for x in (-1.0, 1.5):
                x_t = torch.full((4, 1), x, dtype=torch.float64)
                got = student(x_t, t, {"guidance": torch.full((4,), w + 1)}).x0
                assert_close(got, truth(x_t, t, {}).x0, rtol=0.01, atol=0.01)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [(3.0, 2.0), (-1.0, 2.0), (0.0, math.inf), (math.nan, 1.0)])
def test_impossible_ranges_are_refused(w: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"0 <= w_min <= w_max.*--method\.w_min, --method\.w_max"):
        GuidanceDistillConfig(*w)


def test_what_can_not_be_distilled_is_refused() -> None:
    def refused(match: str, config: GuidanceDistillConfig, student: Denoiser, teacher: Denoiser) -> None:
        with pytest.raises(InputError, match=match):
            GuidanceDistill(config, student, teacher)

    one, several = GuidanceDistillConfig(), GuidanceDistillConfig(2.0, 4.0)
    refused(r"one w for a student without a guidance input, got 2\.0 to 4\.0", several, Net().full_student(), Net())
    for schedule in (ZERO, Flow()):
        eps, v = Net(schedule, "eps"), Net(schedule, "v")
        for student, teacher in ((eps, eps), (eps, v), (v, eps)):
            refused(r"v, x0 or flow prediction where alpha is 0.*got eps", one, student, teacher)
        refused(r"got snr with zero terminal SNR", GuidanceDistillConfig(weighting="snr"), v, v)
    method = GuidanceDistill(one, Net().full_student(), Net())
    with pytest.raises(InputError, match="no prompt.*unconditional.*leave the guidance distillation out"):
        method.training_step(batch())
