"""Latent adversarial diffusion distillation (LADD, arXiv 2403.12015): a few-step student against a judge inside its teacher.

The student's samples and real (or the teacher's own) latents are noised alike, and the frozen teacher looks at both; heads on
its attention blocks learn to tell them apart, and the student learns to be taken for real. There is no other loss, unless a
distillation term (arXiv 2311.17042) is asked for.

Each step has two phases, the discriminator's and then the student's. They share the step's draws through `Batch.memo`, so both
see the same sample; it is computed once without and once with a graph. One computation for both would have to come before
either steps: simultaneous steps, which circle where alternating ones settle (arXiv 1807.04740, section 4).

A step calls the student forward without a graph and the teacher forward on real and made samples in one batch, then both of
them forward with a graph and backward, the teacher to its input alone. Approximate R1 adds a third part to the teacher's
first batch; a distillation term adds a forward of the teacher, of twice the samples where w > 0; the guard adds two forwards of
the student on every `guard_every`-th step. Micro-batches multiply the calls, not the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Cond
from ..config import CommaList
from ..diffusion.losses import approximate_r1
from ..diffusion.timesteps import logit_normal, trainable
from ..method import Losses, Method, Phase
from ..networks.denoiser import Denoiser
from ..networks.discriminator import DenoiserFeatures
from ..networks.network import Network, parameter_bytes
from .adversarial import CollapseGuard, deception, discrimination, distillation, over_heads, two_samples
from .adversarial_config import AdversarialConfig


@dataclass
class LADDConfig(AdversarialConfig):
    """Latent adversarial diffusion distillation.

    Attributes:
        noise_mean: m of the noise level at which the discriminator looks, sigmoid(m + s z) with z ~ N(0, 1).
        noise_std: s of the same.
        taps: the teacher's modules that get a head, comma separated; by default all attention blocks.
        approximate_r1: weight of approximate R1, for a look of the teacher more; 0 means none.
        approximate_r1_sigma: noise on the teacher's input in it.
    """

    probabilities: CommaList = CommaList(("0.7", "0.1", "0.1", "0.1"))  # noqa: RUF009  # immutable
    warmup_probabilities: CommaList = CommaList(("0", "0", "0.5", "0.5"))  # noqa: RUF009
    warmup_steps: int = 500
    noise_mean: float = 1.0
    noise_std: float = 1.0
    approximate_r1: float = 0.0
    approximate_r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.not_negative("approximate_r1", "approximate_r1_sigma", "noise_std")


@dataclass(frozen=True)
class Look:
    """What both phases of a step share: the student's input at its time, and the noise that the discriminator looks through."""

    t: Tensor
    x_t: Tensor
    level: Tensor
    eps: Tensor
    condition: Tensor


class LADD(Method):
    """Distils `teacher` into a student of few steps by a discriminator on the teacher's features.

    Data are latents with their prompts: real, or made by the teacher with constant guidance (as in the paper), which the
    student then has in its weights.

    Args:
        config: the constants.
        student: a LoRA or a full network that starts as the teacher.
        teacher: the frozen denoiser. Gradients pass through it. Where the student is an adapter on it and activations are
            recomputed in backward, a copy of its weights looks in its place: the recomputation would find the adapter on.
        shape: of a latent.
        cond: of some sample, to size the heads.
        seed: of the heads' first weights.

    Raises InputError for taps that don't exist, for eps prediction at a first time of nearly pure noise, and for times between
    the levels of the teacher's table.
    """

    def __init__(
        self,
        config: LADDConfig,
        student: Denoiser,
        teacher: Denoiser,
        shape: Sequence[int],
        cond: Cond,
        seed: int = 0,
    ) -> None:
        self.config, self.student, self.schedule = config, student, student.schedule
        self.times = config.student_times()
        self.times.check(student)
        self.teacher, self.note = looking_on(teacher, student)
        self.features = DenoiserFeatures(self.teacher, config.taps)
        self.discriminator = self.features.discriminator(shape, cond, config.head_width, seed)
        self.guard, self.taken = CollapseGuard(), 0

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "discriminator": self.discriminator}

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(("discriminator",), self.discriminate, rate=self.config.discriminator_rate),
            Phase(("student",), self.deceive),
        )

    def look(self, batch: Batch) -> Look:
        """The draws of this step, made by the phase that comes first."""
        if "look" not in batch.memo:
            x0, rng, config = batch.data(), batch.rng, self.config
            noise, eps = (rng.normal(stream, x0.shape[1:], x0.dtype) for stream in ("noise", "discriminator noise"))
            t, x_t = self.times.start(self.schedule, x0, noise, self.times.index(rng.uniform("time"), self.taken))
            z = rng.normal("discriminator time", dtype=torch.float64).cpu()
            level = trainable(logit_normal(z, config.noise_mean, config.noise_std), self.schedule)
            batch.memo["look"] = Look(t, x_t, level, eps, self.features.condition(level, batch.cond))
        found: Look = batch.memo["look"]
        return found

    def discriminate(self, batch: Batch) -> Losses:
        """The discriminator's loss: real and made samples through the same noise at the same level."""
        look, config = self.look(batch), self.config
        penalised = self.taken % config.r1_every == 0
        real, made, *near = self._looked_at(batch, near=penalised and config.approximate_r1 > 0)
        gamma = config.r1_every * config.r1_gamma if penalised else 0.0
        terms, metrics, logits = discrimination(config.loss_type, self.discriminator, real, made, look.condition, gamma)
        for features in near:
            pairs = zip(logits, self.discriminator(features, look.condition), strict=True)
            metrics["approximate_r1"] = over_heads([approximate_r1(*pair) for pair in pairs])
            terms["approximate_r1_penalty"] = config.r1_every * config.approximate_r1 * metrics["approximate_r1"]
        if config.guard_every and self.taken % config.guard_every == 0:
            metrics["diversity"] = two_samples(self.student, self.times, batch)
        return Losses(terms, metrics, count=len(batch))

    @torch.no_grad()
    def _looked_at(self, batch: Batch, near: bool) -> list[list[Tensor]]:
        """Features of real samples, of made ones and, if `near`, of real ones that are a little off; in one forward.

        What is a little off is the very input of the teacher that the real samples are, at the same level.
        """
        look = self.look(batch)
        fake = self.student(look.x_t, look.t, batch.cond).x0
        inputs = [self.schedule.add_noise(x, look.eps, look.level) for x in (batch.data(), fake)]
        if near:
            n = batch.rng.normal("perturbation", inputs[0].shape[1:], inputs[0].dtype)
            inputs.append(inputs[0] + self.config.approximate_r1_sigma * n)
        return self.features.of_each(inputs, look.level, batch.cond)

    def deceive(self, batch: Batch) -> Losses:
        """The student's loss; its gradient comes back through the frozen teacher, to the noised sample."""
        look, config = self.look(batch), self.config
        fake = self.student(look.x_t, look.t, batch.cond).x0
        made = self.features(self.schedule.add_noise(fake, look.eps, look.level), look.level, batch.cond)
        terms = {"adversarial": deception(config.loss_type, self.discriminator(made, look.condition))}
        if config.distillation:
            given = (fake, look.level, look.eps, batch.cond, batch.uncond, config.w)
            terms["distillation"] = config.distillation * distillation(self.teacher, *given).mean()
        return Losses(terms, count=len(batch))

    def after_step(self) -> None:
        self.discriminator.advance()
        self.taken += 1

    def watch(self, means: Mapping[str, float]) -> str:
        warmed_up = self.taken >= self.times.warmup_steps
        found = [self.note, self.guard.look(means.get("accuracy"), means.get("diversity") if warmed_up else None)]
        self.note = ""
        return "; ".join(words for words in found if words)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.guard.load_state_dict(state["guard"])


def looking_on(teacher: Denoiser, student: Denoiser) -> tuple[Denoiser, str]:
    """(the frozen network that gradients of the student pass through, what to say about it).

    The teacher, or a copy of its bare weights where the student is an adapter on them and activations are recomputed: in
    backward the recomputation of the teacher's part would find the student's adapter on.
    """
    if not student.recomputes:
        return teacher, ""
    if student.adapters is None or student.module is not teacher.module:
        teacher.checkpoint_activations()
        return teacher, ""
    twin = teacher.bare_copy()
    twin.checkpoint_activations()
    size = parameter_bytes(twin.module) / 1e9
    return twin, (
        f"gradient checkpointing with a LoRA student: the discriminator looks through a copy of the teacher's weights "
        f"({size:.2g} GB more), since recomputing them on the student's base would find its adapter on"
    )
