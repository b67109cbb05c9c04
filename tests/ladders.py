"""Small ladders that the tests of progressive distillation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toys import MEAN, STD, Numbers, sd_table

from stepdistill.batch import Batch, Cond
from stepdistill.config import CommaList
from stepdistill.diffusion.prediction import Kind
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.methods.progressive import Progressive, ProgressiveConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.randomness import StepRandom


class Net(Denoiser):
    """Two layers on x_t and t, to which cond["push"] [B] is added where there is one."""

    lora_targets = ("0", "2")

    def __init__(self, schedule: NoiseSchedule | None = None, kind: Kind = "v", seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        super().__init__(net.requires_grad_(False), schedule or sd_table(), kind)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out = self.net(torch.cat([x_t, t[:, None].to(x_t)], 1))
        return out + cond["push"][:, None] if "push" in cond else out


def config(rungs: Sequence[int] = (4, 2, 1), teacher_steps: int = 8, **options: Any) -> ProgressiveConfig:
    """A ladder without guidance, unless it is asked for."""
    return ProgressiveConfig(
        **{"teacher_steps": teacher_steps, "rungs": CommaList.parse(rungs), "w_min": 0.0, "w_max": 0.0, **options}
    )


def ladder(kind: str = "full", given: bool = True, **options: Any) -> Progressive:
    """8 -> 4 -> 2 -> 1 steps of a small network; its first teacher is given, or the student as it starts."""
    teacher = Net()
    student = teacher.full_student() if kind == "full" else teacher.with_lora(LoraSpec(2, 2.0, Net.lora_targets))
    return Progressive(config(**options), student, teacher if given else None)


def batch(size: int = 8, step: int = 0, mean: float | Tensor = MEAN, **conds: Cond) -> Batch:
    """Samples of the Gaussian in float64."""
    draws = torch.Generator().manual_seed(step)
    x0 = mean + STD * torch.randn(size, 3, dtype=torch.float64, generator=draws)
    return Batch(x0, conds.get("cond", {}), conds.get("uncond", {}), StepRandom(0, step, range(size)))


class Pushed(Numbers):
    """Samples with a condition that guidance has something to do with."""

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        one = super().batch(indices, rng)
        one.cond = {"push": 0.2 * one.extra["index"].float() % 1.0}
        one.uncond = {"push": torch.zeros(len(indices))}
        return one


class Rows:
    """Fresh samples of a distribution, [width] each in float64.

    Args:
        draw: standard normal and uniform numbers [B, width] -> samples.
    """

    def __init__(self, draw: Any = None, width: int = 32) -> None:
        self.draw, self.width = draw or (lambda normal, _: MEAN + STD * normal), width

    def __len__(self) -> int:
        return 4096

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        normal = rng.normal("data", (self.width,), torch.float64)
        return Batch(self.draw(normal, rng.uniform("which", (self.width,))), {}, {}, rng)
