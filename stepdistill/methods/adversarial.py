"""What adversarial distillation in latents (:mod:`.ladd`) and in pixels (arXiv 2311.17042) has in common.

The times of a few-step student, the terms of discriminator and student over several heads, the distillation term, and a guard
that says when the game has broken down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Cond
from ..config import CommaList
from ..diffusion.losses import GanLoss, discriminator_loss, generator_loss, mse, r1
from ..diffusion.schedule import NoiseSchedule, Tabulated
from ..diffusion.timesteps import choice
from ..errors import InputError
from ..networks.denoiser import Denoiser
from ..networks.discriminator import Discriminator

AMPLIFIED = 5.0  # sigma / alpha up to which an eps student may begin; 14.6 at the end of Stable Diffusion's table


@dataclass(frozen=True)
class StudentTimes:
    """When a few-step student is trained, which is when it is sampled.

    At the first of the times it is given pure noise, as a sampler begins, whatever the schedule would leave of the data
    there (zero terminal SNR, arXiv 2311.17042, section 3).

    Attributes:
        times: decreasing, in (0, 1].
        probabilities: of each, summing to 1.
        warmup_probabilities: the same for the first `warmup_steps` steps.
        warmup_steps: how many those are.
    """

    times: tuple[float, ...]
    probabilities: tuple[float, ...]
    warmup_probabilities: tuple[float, ...]
    warmup_steps: int

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.times, self.times[1:], strict=False))
        if not self.times or not falling or not 0.0 < self.times[-1] <= self.times[0] <= 1.0:
            raise InputError(
                f"expected decreasing times in (0, 1], got {self.times}; fix --method.times (1,0.75,0.5,0.25 is usual)"
            )
        for name in ("probabilities", "warmup_probabilities"):
            chances: tuple[float, ...] = vars(self)[name]
            sums = math.isclose(sum(chances), 1.0, abs_tol=1e-6)
            if len(chances) != len(self.times) or not sums or min(chances) < 0:
                raise InputError(
                    f"expected a probability for each of {len(self.times)} times, summing to 1, got {chances}; fix "
                    f"--method.{name}"
                )
        if self.warmup_steps < 0:
            raise InputError(f"expected warmup_steps >= 0, got {self.warmup_steps}; fix --method.warmup_steps")

    @property
    def grid(self) -> Tensor:
        """[N] float64, decreasing."""
        return torch.tensor(self.times, dtype=torch.float64)

    def index(self, u: Tensor, taken: int) -> Tensor:
        """Which of the times each u in [0, 1) draws after `taken` steps; [B] -> [B] int64."""
        chances = self.warmup_probabilities if taken < self.warmup_steps else self.probabilities
        return choice(u, torch.tensor(chances, dtype=torch.float64))

    def start(self, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(t [B], x_t [B, ...]): what the student is given at these of its times."""
        t = self.grid[index]
        first = (index == 0).to(x0.device).reshape(-1, *[1] * (x0.ndim - 1))
        return t, torch.where(first, eps, schedule.add_noise(x0, eps, t).to(eps.dtype))

    def check(self, student: Denoiser) -> None:
        """InputError for a student that can't begin at the first time, or times between the levels of its table."""
        first, schedule = self.grid[:1], student.schedule
        amplified = float(schedule.sigma(first) / schedule.alpha(first))
        if student.predicts == "eps" and amplified > AMPLIFIED:
            raise InputError(
                f"expected no eps prediction where one step begins, at t = {self.times[0]:g}: an error of eps is one of x0 "
                f"{amplified:.3g} times as large there. Two ways out: distil a checkpoint of v or flow prediction or with "
                "zero terminal SNR (--teacher.path), or begin at a lower time, such as --method.times 0.4,0.3,0.2,0.1"
            )
        if isinstance(schedule, Tabulated):
            levels = schedule.index(self.grid)
            if not torch.equal(levels, levels.round()):
                raise InputError(
                    f"expected times on the teacher's {schedule.levels} levels, got {self.times}; fix --method.times"
                )


def numbers(words: CommaList, name: str) -> tuple[float, ...]:
    """An option's words as numbers; the InputError for what is none names --method.`name`."""
    try:
        return words.floats()
    except InputError as error:
        raise InputError(f"{error}; fix --method.{name}") from error


def judgement(kind: GanLoss, real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(the discriminator's loss, metrics) over the logits [B, n] of each head, which count alike, however many they have.

    The metrics are the mean logits of both, and the share of logits on the right side of 0.
    """
    loss = over_heads([discriminator_loss(kind, r, f) for r, f in zip(real, fake, strict=True)])
    right = [((r > 0).float().mean(1) + (f < 0).float().mean(1)) / 2 for r, f in zip(real, fake, strict=True)]
    metrics = {
        "logit_real": over_heads([r.mean(1) for r in real]).detach(),
        "logit_fake": over_heads([f.mean(1) for f in fake]).detach(),
        "accuracy": over_heads(right),
    }
    return loss, metrics


def discrimination(
    kind: GanLoss,
    discriminator: Discriminator,
    real: Sequence[Tensor],
    made: Sequence[Tensor],
    condition: Tensor,
    gamma: float = 0.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """(the discriminator's terms, metrics, its logits on the real samples) from the features of both, [B, C, h, w] each.

    Args:
        condition: what they are judged with, [B, D].
        gamma: of R1 on the heads' inputs at real samples (arXiv 2311.17042, section 3.2), taken in float32.
    """
    if gamma:
        real = [feature.float().requires_grad_(True) for feature in real]
    logits = discriminator(real, condition)
    loss, metrics = judgement(kind, logits, discriminator(made, condition))
    terms = {"real_or_made": loss}
    if gamma:
        metrics["r1"] = over_heads([r1(*pair) for pair in zip(logits, real, strict=True)])
        terms["r1_penalty"] = gamma / 2 * metrics["r1"]
    return terms, metrics, logits


def deception(kind: GanLoss, fake: Sequence[Tensor]) -> Tensor:
    """The student's adversarial loss over the logits [B, n] of each head."""
    return over_heads([generator_loss(kind, logits) for logits in fake])


def over_heads(values: Sequence[Tensor]) -> Tensor:
    """The mean over heads and samples of [B] values each, a scalar."""
    return torch.stack(list(values)).mean()


def distillation(
    teacher: Denoiser,
    x_hat: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Cond,
    uncond: Cond,
    w: float = 0.0,
    distance: Callable[[Tensor, Tensor], Tensor] = mse,
) -> Tensor:
    """c(t) |x_hat - x0_teacher(sg(alpha x_hat + sigma eps), t)|^2, c = alpha_t (arXiv 2311.17042, eq. 4); [B].

    The gradient reaches the student through the first x_hat alone: the teacher's input is detached.

    Args:
        x_hat: the student's samples, [B, ...].
        t, eps: of the teacher's input.
        w: its guidance.
        distance: of x_hat and what the teacher makes of it, [B] each; it may be measured elsewhere, as on decoded pixels.
    """
    with torch.no_grad():
        x_t = teacher.schedule.add_noise(x_hat, eps, t)
        scale = torch.full((len(t),), w, dtype=torch.float64)
        guided = teacher.guide(x_t, t, cond, uncond, scale) if w else teacher(x_t, t, cond)
        wanted = guided.x0
    return teacher.schedule.alpha(t).to(x_hat) * distance(x_hat, wanted)


def diversity(one: Tensor, other: Tensor, data: Tensor) -> Tensor:
    """How much two samples of one prompt differ: their distance in units of the spread within a sample of the data; scalar.

    About 1 for what has nothing in common, 0 for a student that draws one picture a prompt. All are [B, ...].
    """
    apart = (0.5 * mse(one, other)).sqrt()
    return (apart / data.flatten(1).std(1, correction=0).clamp(min=1e-6).to(apart)).mean()


@torch.no_grad()
def two_samples(student: Denoiser, times: StudentTimes, batch: Batch) -> Tensor:
    """The :func:`diversity` of two samples of each prompt, made in one step."""
    x0 = batch.data()
    first = times.grid[:1].expand(len(batch))
    noises = [batch.rng.normal(f"guard {i}", x0.shape[1:], x0.dtype) for i in (0, 1)]
    one, other = (student(noise, first, batch.cond).x0 for noise in noises)
    return diversity(one, other, x0)


class CollapseGuard:
    """Watches accuracy and diversity, and says it once when one of them tells that training has broken down.

    It speaks again after it has seen a recovery. Its state is a function of the steps' means, which all processes share.
    """

    DECAY, WON = 0.98, 0.98  # of the running accuracy; above which the discriminator has won
    LOW, PATIENCE = 0.1, 5  # diversity below which a prompt has one picture, for so many looks in a row
    ADVICE = (
        "lower --train.learning_rate or --method.discriminator_rate, raise --method.r1_gamma, or hold the student with "
        "--method.distillation 1"
    )

    def __init__(self) -> None:
        self.accuracy, self.low = 0.5, 0
        self.said_won = self.said_low = False

    def look(self, accuracy: float | None, diversity: float | None) -> str:
        """A warning, or ""; either value may be missing or not finite."""
        said = []
        if accuracy is not None and math.isfinite(accuracy):
            self.accuracy = self.DECAY * self.accuracy + (1 - self.DECAY) * accuracy
            won = self.accuracy > self.WON
            if won and not self.said_won:
                said.append(
                    f"the discriminator has won: it is right about {self.accuracy:.1%} of real and made samples, and has "
                    "little left to teach"
                )
            self.said_won = won
        if diversity is not None and math.isfinite(diversity):
            self.low = self.low + 1 if diversity < self.LOW else 0
            collapsed = self.low >= self.PATIENCE
            if collapsed and not self.said_low:
                said.append(
                    f"the student has collapsed: two samples of one prompt differ by {diversity:.2g} of the spread within an "
                    f"image (below {self.LOW:g} for {self.PATIENCE} looks), so a prompt has nearly one picture"
                )
            self.said_low = collapsed
        return f"{'; '.join(said)}. What helps: {self.ADVICE}" if said else ""

    def state_dict(self) -> dict[str, Any]:
        """Plain scalars."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        vars(self).update(state)
