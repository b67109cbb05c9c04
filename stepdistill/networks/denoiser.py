"""A network that looks at x_t and has an opinion on (x0, eps). A family writes :meth:`Denoiser.call` and no more."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ..batch import Cond, concat
from ..diffusion.guidance import guide_w
from ..diffusion.prediction import Kind, Prediction, read
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError
from .lora import Adapters, LoraSpec, StudentConfig
from .merge import bare
from .network import Network


class Denoiser(Network, ABC):
    """A diffusion backbone with its schedule and prediction kind.

    Attributes:
        schedule: alpha(t), sigma(t).
        predicts: what the output means: eps, x0, v or flow.
        lora_targets: module names that LoRA adapts by default.
        tap_points: module names whose features a discriminator reads by default.
        takes_guidance: whether it reads `cond["guidance"]`, the guidance_scale [B] that it is to behave as if sampled with.
        recomputes: whether activations are computed again in backward (gradient checkpointing).
    """

    lora_targets: Sequence[str] = ()
    tap_points: Sequence[str] = ()
    takes_guidance: bool = False
    recomputes: bool = False

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, predicts: Kind) -> None:
        super().__init__(net)
        self.schedule, self.predicts = schedule, predicts

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's own weights, adapters aside: what its inputs are cast to."""
        return next(self.module.parameters()).dtype

    @abstractmethod
    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The raw output [B, ...]: translates t in [0, 1] (float64, CPU) to native time, packs, calls `self.net`.

        Must be differentiable in t where the backbone is.
        """

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The raw output of this network's kind, [B, ...], with its own adapter active."""
        with self.active():
            return self.call(x_t, t, cond)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The prediction at x_t [B, ...], t [B] float64 on the CPU."""
        return read(self.predicts, self.schedule, self.output(x_t, t, cond), x_t, t)

    def tell(self, cond: Cond, w: Tensor) -> Cond:
        """`cond` with the guidance w [B] where this network has an input for it; it takes the guidance_scale, w + 1."""
        return {**cond, "guidance": w + 1.0} if self.takes_guidance else cond

    def guide(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Prediction:
        """The prediction with classifier-free guidance w [B] on x0 and on eps, both halves in one forward.

        A network that has guidance in it is told w instead; plain where `uncond` is {}, as it is for unconditional models.
        """
        if self.takes_guidance or not uncond:
            return self(x_t, t, self.tell(cond, w))
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), concat(cond, uncond))
        with_prompt, without = both.chunk(2)
        return guide_w(with_prompt, without, w)

    def feature_map(self, name: str, feature: Tensor, x_t: Tensor) -> Tensor:
        """The feature that a tap on `name` kept, as a map [B, C, h, w], or [B, C, 1, 1] where it has no places.

        Here for maps, for vectors [B, C], and for tokens [B, h w, C] in rows, of x_t [B, ..., H, W] at its own size or halved
        (rounded up) any number of times. Families whose tokens lie otherwise write their own. ValueError where it doesn't fit.
        """
        if feature.ndim == 4:
            return feature
        if feature.ndim == 2:
            return feature[:, :, None, None]
        if feature.ndim == 3 and x_t.ndim == 4:
            tokens, (h, w) = feature.shape[1], x_t.shape[-2:]
            while h * w > tokens:
                h, w = (h + 1) // 2, (w + 1) // 2
            if h * w == tokens:
                return feature.transpose(1, 2).unflatten(2, (h, w))
        raise ValueError(
            f"expected a map, a vector or the tokens of an image of {tuple(x_t.shape)} at {name!r}, got a feature of "
            f"{tuple(feature.shape)}; tap another module"
        )

    def pooled(self, cond: Cond) -> Tensor | None:
        """One vector [B, P] a sample that says what its condition is, for a discriminator's heads; None without conditions."""
        return None

    def checkpoint_activations(self, wanted: bool = True) -> None:
        """If `wanted`, trades compute for memory: activations are computed again in backward. InputError if it can't be."""
        if wanted:
            raise InputError(
                f"{type(self).__name__} has no gradient checkpointing; drop --train.gradient_checkpointing"
            )

    def student(self, config: StudentConfig, seed: int = 0, embed_guidance: bool = False) -> Self:
        """What trains, starting as this network: an adapter over its weights, or a network of its own.

        Args:
            config: which of the two.
            seed: of the adapter's first weights.
            embed_guidance: give a full student a guidance input, where the family has one.
        """
        if config.kind == "lora":
            return self.with_lora(config.spec(self.lora_targets), seed=seed)
        return self.full_student(embed_guidance)

    def full_student(self, embed_guidance: bool = False) -> Self:
        """A student with weights of its own, all of them trained, in float32; at first it computes what this network does."""
        if self.adapters is not None:
            raise ValueError("expected a network without adapters to copy in full; open the checkpoint again")
        student = copy.copy(self)
        student.net = copy.deepcopy(self.module).float().requires_grad_(True)
        if embed_guidance:
            student._add_guidance_input()
        student._fix_trainable()
        return student

    def bare_copy(self) -> Self:
        """A frozen copy of this network's weights without any adapter, which shares nothing with it."""
        twin = copy.copy(self)
        twin.net, twin.adapters, twin.adapter = bare(self), None, None
        twin._fix_trainable()
        return twin

    def _add_guidance_input(self) -> None:
        """Families with a guidance input add it to `self.net` here, with an output of zero, and set `takes_guidance`."""

    def with_lora(self, spec: LoraSpec, name: str = "student", seed: int = 0) -> Self:
        """A student that shares this network's weights and trains an adapter on them.

        Afterwards this object computes with the bare base (adapters off): it is the teacher.
        """
        if self.adapters is None:
            self.adapters, self.adapter = Adapters(self.module), None
        self.adapters.attach(name, spec, seed)
        self._trainable = {}
        student = copy.copy(self)
        student.adapter = name
        student._fix_trainable()
        return student
