"""Small students and teachers that the tests of adversarial distillation share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from students import randomised
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond
from stepdistill.config import CommaList
from stepdistill.diffusion.prediction import Kind
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule
from stepdistill.families.analytic import Mixture
from stepdistill.methods.ladd import LADD, LADDConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.networks.network import Network
from stepdistill.randomness import StepRandom

MEANS, STDS, WEIGHTS = (-1.5, 1.0), (0.3, 0.2), (0.3, 0.7)
SIDE = 16


def mixture(schedule: NoiseSchedule | None = None, kind: Kind = "x0") -> Mixture:
    """Two modes of unequal weight: each pixel an independent draw."""
    return Mixture(MEANS, STDS, WEIGHTS, schedule or Flow(), kind)


def mixture_samples(normal: Tensor, uniform: Tensor) -> Tensor:
    """Draws of it from standard normal and uniform numbers of one shape."""
    first = uniform.to(normal) < WEIGHTS[0]
    return torch.where(first, MEANS[0] + STDS[0] * normal, MEANS[1] + STDS[1] * normal)


class Pixels:
    """Fresh pictures [1, side, side] of the mixture, without conditions."""

    def __init__(self, side: int = SIDE, count: int = 4096) -> None:
        self.shape, self.count = (1, side, side), count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        x0 = mixture_samples(rng.normal("data", self.shape), rng.uniform("which", self.shape))
        return Batch(x0, {}, {}, rng)


class Pixelwise(Denoiser):
    """A student that maps each pixel by itself, steeply enough at first to part two modes."""

    def __init__(
        self, schedule: NoiseSchedule | None = None, kind: Kind = "x0", seed: int = 0, width: int = 32
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Conv2d(2, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, 1, 1)]
        with torch.no_grad():
            for parameter in layers[0].parameters():
                parameter.mul_(4.0)
        super().__init__(nn.Sequential(*layers), schedule or Flow(), kind)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        level = t.to(x_t).reshape(-1, 1, 1, 1).expand_as(x_t)
        out: Tensor = self.net(torch.cat([x_t, level], 1))
        return out


def config(times: Sequence[float] = (1.0,), **options: Any) -> LADDConfig:
    """One step without a warm-up, unless it is asked for."""
    even = [1.0 / len(times)] * len(times)
    lists = {"times": times, "probabilities": even, "warmup_probabilities": even}
    given = {name: CommaList.parse(options.pop(name, value)) for name, value in lists.items()}
    return LADDConfig(**given, **{"warmup_steps": 0, **options})


class Prompted:
    """Pictures [1, side, side] of a Gaussian around a mean that the condition `label` says."""

    def __init__(self, side: int = 4, count: int = 64) -> None:
        self.shape, self.count = (1, side, side), count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        label = torch.tensor([i % 3 for i in indices])
        x0 = label.float()[:, None, None, None] + 0.3 * rng.normal("data", self.shape)
        return Batch(x0, {"label": label}, {"label": -torch.ones_like(label)}, rng)


class Convolutional(Denoiser):
    """Two blocks of convolutions with a norm, a label and the time as inputs; both blocks are tap points."""

    lora_targets = ("first", "second", "last")
    tap_points = ("first", "second")

    def __init__(self, schedule: NoiseSchedule | None = None, kind: Kind = "v", seed: int = 0, width: int = 6) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = Blocks(width)
        super().__init__(net.requires_grad_(False).eval(), schedule or Cosine(), kind)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.dtype
        plain = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
        known = torch.stack([t.to(x_t.device), cond.get("label", plain)], 1).to(dtype)
        out: Tensor = self.net(x_t.to(dtype), known)
        return out

    def pooled(self, cond: Cond) -> Tensor | None:
        return nn.functional.one_hot(cond["label"] + 1, 4).float() if "label" in cond else None

    def checkpoint_activations(self, wanted: bool = True) -> None:
        if wanted:
            self.module.recompute = self.recomputes = True


class Blocks(nn.Module):
    """The module of it; `recompute` turns gradient checkpointing on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 1)
        self.recompute = False

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        x = torch.cat([x, known[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        for block in (self.first, self.second):
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(lambda x, b=block: b(x).tanh(), x, use_reentrant=False)
            else:
                x = block(x).tanh()
        out: Tensor = self.last(x)
        return out


def game(kind: str = "full", teacher: Denoiser | None = None, seed: int = 0, **options: Any) -> LADD:
    """A small game with prompts: a student that starts as its teacher, four times, heads on both blocks."""
    teacher = teacher or Convolutional()
    student = (
        teacher.full_student() if kind == "full" else teacher.with_lora(LoraSpec(2, 2.0, tuple(teacher.lora_targets)))
    )
    given = config((1.0, 0.75, 0.5, 0.25), **{"head_width": 8, "guard_every": 3, **options})
    return LADD(given, student, teacher, (1, 4, 4), {"label": torch.zeros(1).long()}, seed)


def batch(size: int = 4, step: int = 0, data: Any = None) -> Batch:
    """The first samples of :class:`Prompted`."""
    return (data or Prompted()).batch(range(size), StepRandom(0, step, range(size)))


@contextmanager
def learning(method: LADD, role: str) -> Iterator[None]:
    """As the trainer has it in a phase."""
    networks = method.networks()
    for name, network in networks.items():
        for parameter in network.trainable():
            parameter.requires_grad_(name == role)
    yield
    for network in networks.values():
        for parameter in network.trainable():
            parameter.requires_grad_(True)


def gradients(network: Network) -> list[Tensor]:
    """Copies of what a backward left; all parameters must have been reached."""
    found = [p.grad for p in network.trainable()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def moved(method: LADD, seed: int = 3) -> LADD:
    """With a student that is no longer its teacher."""
    randomised(method.student, seed, 0.3)
    return method


def student_gradients(method: LADD, one: Batch) -> list[Tensor]:
    """Of the student's phase."""
    for parameter in method.student.trainable():
        parameter.grad = None
    with learning(method, "student"):
        method.deceive(one).total.backward()
    return gradients(method.student)


def penalties(method: LADD, one: Batch) -> Any:
    """The losses of the discriminator's phase."""
    with learning(method, "discriminator"):
        return method.discriminate(one)
