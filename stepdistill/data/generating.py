"""Latents that the teacher makes from prompts alone, with classifier-free guidance and DDIM (arXiv 2207.12598, 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Cond, move
from ..diffusion.guidance import guide_scale
from ..diffusion.prediction import Prediction
from ..diffusion.solver import sample
from ..diffusion.timesteps import shift
from ..errors import InputError
from ..families.model import Model
from ..randomness import StepRandom
from .encoding import check_finite, stacked
from .filling import Made, Maker

SHARD = 64  # a killed run loses at most this many


class TeacherLatents(Maker):
    """One latent a prompt, from noise that is a function of (seed, the prompt's place in the list).

    Args:
        model: whose denoiser samples.
        prompts: one a latent.
        resolution: side of the images in pixels.
        shape: (C, h, w) of the latents at that resolution.
        prompt_rows: for each prompt its row in the cache.
        guidance_scale: Diffusers' convention: 1 is no guidance, and costs half; told to a teacher that has guidance in it.
        steps: of DDIM, on the schedule's even grid from t = 1 to 0; on a flow with the shift of the teacher's sampler.
        batch_size: latents made at once.
        seed: of the noise.
    """

    kind, what, shard = "latents", "latents of the teacher", SHARD

    def __init__(
        self, model: Model, prompts: Sequence[str], resolution: int, shape: tuple[int, int, int], prompt_rows: Sequence[int],
        guidance_scale: float, steps: int, batch_size: int = 16, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.prompts, self.resolution, self.shape = model, prompts, resolution, shape
        self.prompt_rows, self.guidance_scale, self.steps = prompt_rows, guidance_scale, steps
        self.batch_size, self.seed, self.items = batch_size, seed, len(prompts)
        self.bad: list[str] = []

    def make(self, items: range) -> Made:
        parts = [self._made(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]
        return Made(stacked(parts), len(items))

    @torch.no_grad()
    def _made(self, items: range) -> dict[str, Tensor]:
        prompts, size = [self.prompts[i] for i in items], (self.resolution, self.resolution)
        noise = StepRandom(self.seed, 0, items).normal("teacher latents", self.shape)
        latents = self._sampled(noise, self.model.conditions(prompts, size)).float().cpu()
        check_finite(prompts, latents)
        return {
            "mean": latents,
            "original": torch.tensor([size] * len(items)),
            "crop": torch.zeros(len(items), 2, dtype=torch.int64),
            "prompt": torch.tensor([self.prompt_rows[i] for i in items]),
        }

    def _sampled(self, noise: Tensor, cond: Cond) -> Tensor:
        """Latents [B, C, h, w] from noise at t = 1."""
        denoiser, device = self.model.denoiser, self.model.device
        guided = self.guidance_scale != 1.0 and not denoiser.takes_guidance
        noise, cond, uncond = noise.to(device), move(cond, device), move(self.model.uncond(cond), device)
        if guided and not uncond:
            raise InputError(
                f"expected a model that knows what no prompt is, got {self.model.name!r}, which cannot be guided; give "
                "--data.guidance_scale 1"
            )
        scale = torch.full((len(noise),), self.guidance_scale, dtype=torch.float64)
        cond = denoiser.tell(cond, scale - 1.0)
        grid = shift(denoiser.schedule.grid(self.steps), self.model.shift(self.shape))

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            prediction = denoiser(x_t, t, cond)
            return guide_scale(prediction, denoiser(x_t, t, uncond), scale) if guided else prediction

        return sample(denoise, denoiser.schedule, noise, grid)
