"""LCM with a full student: the average that it is trained towards, and the guidance that it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, Numbers, options, saved, sd_table, stopping_after

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.boundary import lcm_scalings
from stepdistill.diffusion.losses import pseudo_huber
from stepdistill.diffusion.solver import ddim
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, LinearStudent, TwoClass
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

GAUSSIAN = Gaussian(2.0, 0.3, sd_table(), "x0")


def linear(config: LCMConfig, teacher: Denoiser = GAUSSIAN) -> LCM:
    """LCM of a student with one affine map a grid point that starts as the teacher."""
    grid = LCM(config, GAUSSIAN, GAUSSIAN).grid
    student = LinearStudent(grid, teacher.schedule).imitate(GAUSSIAN)
    student.module.double()
    return LCM(config, student, teacher)


def batch(step: int = 0, size: int = 4, **conds: Cond) -> Batch:
    draws = torch.Generator().manual_seed(step)
    x0 = 2.0 + 0.3 * torch.randn(size, 3, generator=draws, dtype=torch.float64)
    return Batch(x0, conds.get("cond", {}), conds.get("uncond", {}), StepRandom(0, step, range(size)))


def weights(network: Any) -> list[Tensor]:
    return [p.detach().clone() for p in network.module.parameters()]


def moved(network: Any, by: float) -> None:
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.add_(by)


def test_the_target_is_an_average_of_the_student() -> None:
    method = linear(LCMConfig(target_decay=0.9))
    assert set(method.networks()) == {"student", "target"}
    start = weights(method.target)
    for _ in range(3):
        moved(method.student, 1.0)
        method.after_step()
    # theta_n = start + n: the average lags by hand 0.9 (0.9 (0.1 * 1) + 0.1 * 2) + 0.1 * 3
    lag = 0.9 * (0.9 * 0.1 + 0.2) + 0.3
    assert_close(weights(method.target), [value + lag for value in start])
    assert_close(weights(method.student), [value + 3 for value in start])


def test_the_loss_looks_at_the_average_further_on_and_not_at_the_student() -> None:
    config = LCMConfig(target_decay=0.9)
    method = linear(config)
    moved(method.target, 0.1)
    one = batch(size=8)
    loss = method.training_step(one).terms["consistency"]
    k = one.rng.integers("time", 0, 50)
    t, s = method.grid[k], method.grid[k + 1]
    x_t = method.schedule.add_noise(one.data(), one.rng.normal("noise", (3,), torch.float64), t)
    x_s = ddim(method.schedule, GAUSSIAN(x_t, t, {}), s)

    def jump(x: Tensor, time: Tensor, by: float) -> Tensor:
        skip, out = lcm_scalings(method.schedule.index(time), 10.0, 0.5)
        x0 = GAUSSIAN(x, time, {}).x0 + by * (x + 1.0)  # 0.1 on weight and bias of an affine map
        return skip[:, None] * x + out[:, None] * x0

    assert_close(loss, pseudo_huber(jump(x_t, t, 0.0), jump(x_s, s, 0.1), 0.001).mean())


def test_only_the_student_learns() -> None:
    method = linear(LCMConfig())
    method.training_step(batch()).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.module.parameters())
    assert any(bool(p.grad.any()) for p in method.student.module.parameters())


class Net(Denoiser):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 3)), sd_table(), "eps")

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t)


def adapted(config: LCMConfig) -> LCM:
    teacher = Net()
    return LCM(config, teacher.with_lora(LoraSpec(2, 2.0, ("0",))), teacher)


def test_a_full_student_has_an_average_by_default_and_a_lora_has_none() -> None:
    assert linear(LCMConfig()).decay == 0.95
    assert set(linear(LCMConfig(target_decay=0.0)).networks()) == {"student"}
    for config in (LCMConfig(), LCMConfig(target_decay=0.0)):
        method = adapted(config)
        assert method.target is method.student and set(method.networks()) == {"student"}
        method.after_step()


def test_a_lora_may_agree_with_an_average_of_its_adapter() -> None:
    method = adapted(LCMConfig(target_decay=0.9))
    assert set(method.networks()) == {"student", "target"}
    student, target = method.student.named_trainable(), method.target.state()
    assert set(student) == set(target) and not method.target.trainable()
    start = {name: value.clone() for name, value in target.items()}
    with torch.no_grad():
        for parameter in student.values():
            parameter.add_(1.0)
    method.after_step()
    assert_close(target, {name: value + 0.1 for name, value in start.items()})

    x, t = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.5]).double()
    base = method.teacher.output(x, t, {})
    for network, part in (
        (method.student, student),
        (method.target, target),
    ):  # each computes with its own, the teacher with none
        a, b = (next(v for n, v in part.items() if letter in n) for letter in ("lora_A", "lora_B"))
        assert_close(network.output(x, t, {}), base + x @ a.T @ b.T)


def test_the_average_of_an_adapter_learns_nothing() -> None:
    method = adapted(LCMConfig(target_decay=0.9))
    method.training_step(Batch(torch.randn(4, 3), {}, {}, StepRandom(0, 0, range(4)))).total.backward()
    assert all(p.grad is not None for p in method.student.trainable())
    named = dict(method.student.module.named_parameters())
    assert not [n for n, p in named.items() if "student." not in n and p.grad is not None]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(InputError, match=r"target_decay in \[0, 1\).*--method.target_decay"):
        LCMConfig(target_decay=decay)


class Guided(Denoiser):
    """Remembers what it is told."""

    takes_guidance = True

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), sd_table(), "x0")
        self.told: list[Cond] = []

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.told.append(cond)
        return self.net(x_t[..., None])[..., 0]


def test_student_and_target_are_told_the_guidance_of_the_step_and_the_teacher_is_not() -> None:
    student = Guided()
    asked: list[Cond] = []

    class Teacher(TwoClass):
        def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            asked.append(cond)
            return super().call(x_t, t, cond)

    teacher = Teacher((1.0, 3.0), 0.3, sd_table(), "x0")
    method = LCM(LCMConfig(w_min=2.0, w_max=6.0), student, teacher)
    cond = {"label": torch.tensor([0, 1, 0, 1])}
    one = batch(cond=cond, uncond={"label": torch.full((4,), -1)})
    one.x0 = one.data().float()
    method.training_step(one)
    first, second = student.told  # the target is a copy that shares the list
    assert_close(first["guidance"], second["guidance"], **EXACT)
    u = one.rng.uniform("guidance")
    assert_close(first["guidance"], 1.0 + 2.0 + 4.0 * u)  # guidance_scale = w + 1, w in [2, 6)
    assert_close(first["label"], cond["label"], **EXACT)
    assert asked and all("guidance" not in told for told in asked)


def test_a_stopped_run_continues_with_its_average(tmp_path: Path) -> None:
    config = options(max_train_steps=8, checkpointing_steps=4, resume_from_checkpoint="latest", learning_rate=0.05)

    def method() -> LCM:
        return linear(LCMConfig(num_ddim_timesteps=10))

    whole = method()
    Trainer(config, tmp_path / "whole").fit(whole, Numbers())
    start = method()
    assert not torch.equal(weights(whole.target)[0], weights(start.target)[0])
    assert not torch.equal(weights(whole.target)[0], weights(whole.student)[0])
    first = method()
    with pytest.raises(RuntimeError, match="enough"), stopping_after(first, 6, _raise):
        Trainer(config, tmp_path / "stopped").fit(first, Numbers())
    Trainer(config, tmp_path / "stopped").fit(method(), Numbers())
    assert_close(saved(tmp_path / "stopped")[0], saved(tmp_path / "whole")[0], **EXACT)


def _raise() -> None:
    raise RuntimeError("enough")
