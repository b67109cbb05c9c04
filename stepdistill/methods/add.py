"""Adversarial diffusion distillation (ADD, arXiv 2311.17042): a few-step student against a judge of its decoded pictures.

The student's samples and real latents are decoded alike, and a frozen vision network looks at both. Heads on its blocks learn
to tell them apart; the student learns to be taken for real while it stays near what its teacher makes of its samples.

The gradient comes back through the vision network and the decoder, neither of which changes. Decoding is what costs: memory
grows with the pictures' area, and `crop` decodes a part of each. As in :mod:`.ladd` a step has two phases that share its draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..batch import Batch, Cond
from ..config import CommaList
from ..diffusion.losses import mse
from ..diffusion.timesteps import trainable
from ..errors import InputError
from ..method import Losses, Method, Phase
from ..networks.augmentation import Augmentation, check_kinds
from ..networks.denoiser import Denoiser
from ..networks.discriminator import heads_for
from ..networks.image_features import ImageFeatures
from ..networks.network import Network
from .adversarial import CollapseGuard, deception, discrimination, distillation, two_samples
from .adversarial_config import AdversarialConfig

Space = Literal["latents", "pixels"]


@dataclass
class ADDConfig(AdversarialConfig):
    """Adversarial diffusion distillation.

    Attributes:
        taps: the eye's modules that get a head, comma separated; by default four of its blocks, evenly spaced.
        augmentations: of what the discriminator sees, comma separated: colour, translation, cutout; '' means none.
        crop: side in latents of the part of each sample that is decoded and judged, to save memory; 0 means all of it.
        image_condition: the heads also know how the eye sees the real picture, where the student was given something of it.
        distillation: weight of the distance to what the teacher makes of the student's noised sample; 0 means none.
        distance: what that is measured on: latents, or the pixels that the discriminator sees.
    """

    distillation: float = 2.5
    augmentations: CommaList = CommaList(("colour", "translation", "cutout"))  # noqa: RUF009  # immutable
    crop: int = 0
    image_condition: bool = False
    distance: Space = "latents"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kinds(self.augmentations)
        self.not_negative("crop")
        if self.distance not in get_args(Space):
            raise InputError(f"expected distance in {get_args(Space)}, got {self.distance!r}; fix --method.distance")


@dataclass(frozen=True)
class Look:
    """What both phases of a step share.

    Attributes:
        t, x_t: the student's input.
        corner: (row, column) of each sample's crop, in latents.
        augmentation: of real and made pictures.
        condition: what the heads judge with.
    """

    t: Tensor
    x_t: Tensor
    corner: Tensor
    augmentation: Augmentation
    condition: Tensor


class ADD(Method):
    """Distils `teacher` into a student of few steps by a discriminator on decoded pictures, and by the teacher itself.

    Args:
        config: the constants.
        student: a LoRA or a full network that starts as the teacher.
        teacher: the frozen denoiser. It only computes without gradient, so a LoRA student's own base does, adapters off, with
            gradient checkpointing too: nothing of the teacher's is computed again in backward.
        eye: what the discriminator looks through.
        decode: latents [B, C, h, w] -> pixels [B, 1 or 3, H, W] in about [-1, 1], differentiable, of a frozen decoder.
        shape: of a latent.
        cond: of some sample, to size the heads.
        seed: of the heads' first weights.

    Raises InputError for a crop larger than a latent, for eps prediction at a first time of nearly pure noise, and for times
    between the levels of the teacher's table.
    """

    def __init__(
        self,
        config: ADDConfig,
        student: Denoiser,
        teacher: Denoiser,
        eye: ImageFeatures,
        decode: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        cond: Cond,
        seed: int = 0,
    ) -> None:
        self.config, self.student, self.teacher, self.eye = config, student, teacher, eye
        self.schedule, self._decode = student.schedule, decode
        self.times = config.student_times()
        self.times.check(student)
        if config.crop > min(shape[-2:]):
            raise InputError(
                f"expected a crop of at most {min(shape[-2:])} latents, a whole sample, got {config.crop}; fix --method.crop"
            )
        self.discriminator = self._heads(shape, cond, seed)
        self.guard, self.taken = CollapseGuard(), 0

    @torch.no_grad()
    def _heads(self, shape: Sequence[int], cond: Cond, seed: int) -> Any:
        """Heads for the eye's features; it looks once at decoded noise, to see their sizes."""
        count = len(next(iter(cond.values()))) if cond else 1
        device = next(self.student.module.parameters()).device
        noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)).to(device)
        pixels = self.decoded(noise, torch.zeros(count, 2, dtype=torch.int64))
        condition = self._condition(cond, pixels, torch.ones(count))
        return heads_for(self.eye(pixels), condition, self.config.head_width, seed)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "discriminator": self.discriminator}

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(("discriminator",), self.discriminate, rate=self.config.discriminator_rate),
            Phase(("student",), self.deceive),
        )

    # -- what the discriminator sees ----------------------------------------------------------------------------------

    def decoded(self, latents: Tensor, corner: Tensor) -> Tensor:
        """Pixels of latents [B, C, h, w], or of the crop of each at its corner [B, 2]; in float32, as decoders need it."""
        if side := self.config.crop:
            parts = zip(latents, corner.tolist(), strict=True)
            latents = torch.stack([one[:, y : y + side, x : x + side] for one, (y, x) in parts])
        with torch.autocast(latents.device.type, enabled=False):
            return self._decode(latents.float())

    @torch.no_grad()
    def real(self, batch: Batch, corner: Tensor) -> Tensor:
        """Pixels of the data, decoded too: else the discriminator would know a picture by the autoencoder's traces."""
        if "real" not in batch.memo:
            batch.memo["real"] = self.decoded(batch.data(), corner)
        pixels: Tensor = batch.memo["real"]
        return pixels

    @torch.no_grad()
    def _condition(self, cond: Cond, real: Tensor, informed: Tensor) -> Tensor:
        """[B, D]: the pooled prompt, and with `image_condition` the real picture as the eye sees it, each in units of its size.

        The picture is left out (zeros) where the student was given pure noise: it can't know it (`informed` [B] is 0).
        """
        pooled, parts = self.teacher.pooled(cond), []
        if pooled is not None:
            parts.append(functional.layer_norm(pooled.float(), pooled.shape[1:]))
        if self.config.image_condition:
            seen = self.eye.pooled(real).float()
            parts.append(functional.layer_norm(seen, seen.shape[1:]) * informed.to(seen)[:, None])
        return torch.cat(parts, 1) if parts else real.new_ones(len(real), 1)

    def look(self, batch: Batch) -> Look:
        """The draws of this step, made by the phase that comes first."""
        if "look" not in batch.memo:
            x0, rng = batch.data(), batch.rng
            index = self.times.index(rng.uniform("time"), self.taken)
            t, x_t = self.times.start(self.schedule, x0, rng.normal("noise", x0.shape[1:], x0.dtype), index)
            room = torch.tensor([side - (self.config.crop or side) + 1 for side in x0.shape[-2:]])
            corner = (rng.uniform("crop", (2,)) * room).long()
            augmentation = Augmentation(self.config.augmentations, rng)
            condition = self._condition(batch.cond, self.real(batch, corner), index > 0)
            batch.memo["look"] = Look(t, x_t, corner, augmentation, condition)
        found: Look = batch.memo["look"]
        return found

    # -- the two phases -----------------------------------------------------------------------------------------------

    def discriminate(self, batch: Batch) -> Losses:
        """The discriminator's loss: real and made pictures, cut and augmented alike."""
        look, config = self.look(batch), self.config
        with torch.no_grad():
            fake = self.student(look.x_t, look.t, batch.cond).x0
            pictures = self.real(batch, look.corner), self.decoded(fake, look.corner)
            real, made = (self.eye(look.augmentation(pixels)) for pixels in pictures)
        gamma = config.r1_every * config.r1_gamma if self.taken % config.r1_every == 0 else 0.0
        terms, metrics, _ = discrimination(config.loss_type, self.discriminator, real, made, look.condition, gamma)
        if config.guard_every and self.taken % config.guard_every == 0:
            metrics["diversity"] = two_samples(self.student, self.times, batch)
        batch.memo.pop("real")  # the other phase has no need of it
        return Losses(terms, metrics, count=len(batch))

    def deceive(self, batch: Batch) -> Losses:
        """The student's loss; its gradient comes back through eye and decoder, and from the distillation term."""
        look, config = self.look(batch), self.config
        fake = self.student(look.x_t, look.t, batch.cond).x0
        pixels = self.decoded(fake, look.corner)
        made = self.eye(look.augmentation(pixels))
        terms = {"adversarial": deception(config.loss_type, self.discriminator(made, look.condition))}
        if config.distillation:

            def distance(x_hat: Tensor, wanted: Tensor) -> Tensor:
                return (
                    mse(x_hat, wanted)
                    if config.distance == "latents"
                    else mse(pixels, self.decoded(wanted, look.corner))
                )

            t = trainable(batch.rng.uniform("distillation time"), self.schedule)
            eps = batch.rng.normal("distillation noise", fake.shape[1:], fake.dtype)
            given = (fake, t, eps, batch.cond, batch.uncond, config.w, distance)
            terms["distillation"] = config.distillation * distillation(self.teacher, *given).mean()
        return Losses(terms, count=len(batch))

    def after_step(self) -> None:
        self.discriminator.advance()
        self.taken += 1

    def watch(self, means: Mapping[str, float]) -> str:
        warmed_up = self.taken >= self.times.warmup_steps
        return self.guard.look(means.get("accuracy"), means.get("diversity") if warmed_up else None)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.guard.load_state_dict(state["guard"])
