"""A checkpoint, opened: the denoiser and everything around it that a recipe needs. One subclass a pipeline class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..networks.denoiser import Denoiser
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Model(ABC):
    """A text-to-image (or unconditional) model in its parts.

    Attributes:
        denoiser: the teacher.
        name: path or hub id, as model cards name it.
        resolution: the pixel size the checkpoint was made for.
        latent_shape: (C, H, W) of the denoiser's input at that resolution.
        examples: two prompts that this model understands, for checks.
        patch: latents that the denoiser sees as one, along a side; their height and width are multiples of it.
        usual_guidance: the guidance_scale of examples with a student that is told it.
    """

    denoiser: Denoiser
    name: str
    resolution: int
    latent_shape: tuple[int, int, int]
    examples: tuple[str, str] = ("a", "another one")
    patch: int = 1
    usual_guidance: float = 8.0

    @property
    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """All parts that have weights, the denoiser's first."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.modules[0].parameters()).device

    def to(self, device: Any) -> Self:
        """Moves all parts to a device; returns self."""
        for module in self.modules:
            module.to(device)
        return self

    def set_aside(self, student: Denoiser) -> None:
        """Moves this model's denoiser to the CPU, for trainings that need it no more; not where the student is made of it."""
        if student.adapters is None and student.module is not self.denoiser.module:
            self.denoiser.module.to("cpu")

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the scaled latents of pixels [B, 3, H, W] in [-1, 1]; each [B, C, h, w] float32."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents of pixels [B, 3, H, W] in [-1, 1]: the posterior's mean, [B, C, h, w]."""
        return self.posterior(pixels)[0]

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        """Text conditions of B prompts, [B, ...] each, cacheable; see :meth:`conditions` for all that there are."""

    @abstractmethod
    def uncond(self, cond: Cond) -> Cond:
        """`cond` with its text keys replaced by this family's own "no prompt"; size conditions stay."""

    def size_cond(
        self, original: Sequence[tuple[int, int]], crop: Sequence[tuple[int, int]], target: Sequence[tuple[int, int]]
    ) -> Cond:
        """Conditions on image size for families that have them (SDXL's time ids); {} elsewhere."""
        return {}

    def conditions(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Cond:
        """All that the denoiser is conditioned on for B prompts: text, and the size of images that were never cropped.

        Args:
            prompts: B of them.
            size: (height, width) in pixels; the model's own by default.
        """
        sizes = [size or (self.resolution, self.resolution)] * len(prompts)
        return {**self.encode_prompts(prompts), **self.size_cond(sizes, [(0, 0)] * len(prompts), sizes)}

    @property
    def stock_resolution(self) -> int:
        """The pixel size of the stock pipeline's images where it is told none."""
        return self.resolution

    def shift(self, latent_shape: tuple[int, ...]) -> float:
        """Timestep shift of the checkpoint's own sampler, for latents of that shape; 1 for those that have none."""
        return 1.0

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in about [-1, 1] of scaled latents [B, C, h, w]; differentiable."""

    def example(self) -> tuple[tuple[int, int, int], Cond]:
        """(the shape of a latent, conditions of some samples), for networks that are made to measure."""
        return self.latent_shape, self.conditions(self.examples)

    def checkpoint_activations(self, student: Denoiser, wanted: bool = True) -> None:
        """If `wanted`, gradients through the student and through :meth:`decode` take less memory and more compute."""
        student.checkpoint_activations(wanted)
        if wanted:
            self._checkpoint_decoder()

    def _checkpoint_decoder(self) -> None:
        """Families that decode by a network have it computed again in backward."""

    @abstractmethod
    def pipeline(self, student: Denoiser | None = None) -> DiffusionPipeline:
        """A stock pipeline over the teacher (adapters off) or the student, sharing all weights in memory.

        Enter `student.active()` or `denoiser.active()` around calls to it when they share one base.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides the latents and embeddings of an image and its caption."""

    def denoiser_fingerprint(self) -> str:
        """A hash of the denoiser's base weights and of how it is read, which decide the samples that it makes."""
        levels = self.denoiser.schedule.alpha(self.denoiser.schedule.grid(16)).tolist()
        return fingerprint((type(self.denoiser).__name__, self.denoiser.predicts, levels), self.denoiser.module)

    def denoiser_hash(self) -> dict[str, str]:
        """dtype -> the same with the weights in it, on every machine: by this a teacher is known again, wherever it lies.

        Two of them say something of each other where they have a dtype in common.
        """
        schedule = self.denoiser.schedule
        levels = [
            f"{level:.6f}" for level in schedule.alpha(schedule.grid(16)).tolist()
        ]  # whose last bits machines differ in
        dtype = str(self.denoiser.dtype).removeprefix("torch.")
        return {dtype: fingerprint((self.denoiser.predicts, levels), self.denoiser.module)}
