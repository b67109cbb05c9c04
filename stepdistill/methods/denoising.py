"""Plain diffusion training (DDPM, arXiv 2006.11239): how a teacher is made or fine-tuned, in any schedule and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch, Cond
from ..diffusion.losses import min_snr, mse
from ..diffusion.prediction import target
from ..diffusion.schedule import Tabulated
from ..diffusion.timesteps import logit_normal, uniform
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
        if isinstance(self.schedule, Tabulated):
            return (torch.floor(t * self.schedule.levels) + 1.0) / self.schedule.levels
        return t.clamp(min=1e-5)

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
            loss = loss * self._weight(t).to(loss)
        return Losses({"denoising": loss.mean()}, count=len(batch))

    def _weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) on the x0 error (eq. 3), as a factor on the error of the output's own kind, [B]."""
        snr = self.schedule.snr(t)
        assert self.config.snr_gamma is not None
        weight = min_snr(snr, self.config.snr_gamma)
        # |x0 error|^2 = |output error|^2 / f:  f = SNR for eps, SNR + 1 for v on VP, 1 for x0, (alpha + sigma)^2-like for flow
        if self.student.predicts == "x0":
            return weight
        if self.student.predicts == "eps":
            return weight / snr
        a, b = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.student.predicts == "v":
            return weight * b**2 / (a**2 + b**2) ** 2
        d_a, d_b = self.schedule.rates(t)
        return weight * (b / (d_a * b - d_b * a)) ** 2
