"""Plain diffusion training (DDPM, arXiv 2006.11239): how a teacher is made or fine-tuned, in any schedule and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch, Cond
from ..diffusion.losses import min_snr, mse
from ..diffusion.prediction import coefficients, target
from ..diffusion.timesteps import logit_normal, trainable, uniform
from ..errors import InputError
from ..method import Losses, Method
from ..networks.denoiser import Denoiser
from ..networks.network import Network


@dataclass
class DenoisingConfig:
    """Plain diffusion training.

    Attributes:
        caption_dropout: share of samples trained without their prompt, which classifier-free guidance needs.
        time_distribution: uniform, or logit_normal (arXiv 2403.03206).
        snr_gamma: min-SNR weighting (arXiv 2303.09556); none by default.
    """

    caption_dropout: float = 0.1
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise InputError(f"expected caption_dropout in [0, 1], got {self.caption_dropout}")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise InputError(f"expected snr_gamma > 0, got {self.snr_gamma}; 5 is usual")


class Denoising(Method):
    """The mean squared error of a denoiser's own output kind, over random times."""

    def __init__(self, config: DenoisingConfig, student: Denoiser) -> None:
        self.config, self.student, self.schedule = config, student, student.schedule

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def times(self, batch: Batch) -> Tensor:
        """[B] training times; on a discrete table they fall on its levels."""
        if self.config.time_distribution == "uniform":
            t = uniform(batch.rng.uniform("time"))
        else:
            t = logit_normal(batch.rng.normal("time", dtype=torch.float64).cpu())
        return trainable(t, self.schedule)

    def drop_prompts(self, batch: Batch) -> Cond:
        """`batch.cond` with a share of samples replaced by `batch.uncond`."""
        if not batch.uncond or self.config.caption_dropout == 0.0:
            return batch.cond
        drop = batch.rng.uniform("caption_dropout") < self.config.caption_dropout
        return {
            name: torch.where(drop.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), batch.uncond[name], value)
            for name, value in batch.cond.items()
        }

    def training_step(self, batch: Batch) -> Losses:
        x0, t = batch.data(), self.times(batch)
        eps = batch.rng.normal("noise", x0.shape[1:], x0.dtype)
        x_t = self.schedule.add_noise(x0, eps, t)
        kind = self.student.predicts
        wanted = target(kind, self.schedule, x0, eps, t)
        output = self.student.output(x_t, t, self.drop_prompts(batch)).to(wanted.dtype)
        loss = mse(output, wanted)
        if self.config.snr_gamma is not None:
            loss = loss * self._weight(t, self.config.snr_gamma).to(loss)
        return Losses({"denoising": loss.mean()}, count=len(batch))

    def _weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) on the x0 error (eq. 3), as a factor on the error of the output's own kind, [B]."""
        a, b = coefficients(self.student.predicts, self.schedule, t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        # at a given x_t, an error e of the output is one of sigma e / (a sigma - b alpha) of x0: the 2x2 solve's first row
        return min_snr(self.schedule.snr(t), gamma) * (sigma / (a * sigma - b * alpha)) ** 2
