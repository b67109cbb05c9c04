"""LCM-LoRA and progressive distillation as one writes them for a single v-predicting UNet with a table of 1000 levels.

PyTorch alone, nothing logged, saved or resumable: what the trainer's step is compared with. The `loss` of each loop is the
method's own to the last digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stepdistill.methods.lcm import LCM
from stepdistill.methods.progressive import Progressive


class ByHand(ABC):
    """A loop around a loss.

    Args:
        method: whose networks, schedule and constants are used; none of its code.
        data: mean and std of latents [N, C, h, w], prompt_embeds [N, L, D] of their captions.
        empty: [1, L, D] embedding of no prompt.
        batch: images a step.
    """

    def __init__(
        self, method: LCM | Progressive, data: tuple[Tensor, Tensor, Tensor], empty: Tensor, batch: int
    ) -> None:
        self.parameters, self.data, self.empty, self.batch = method.student.trainable(), data, empty, batch

    def factors(self, *values: Tensor) -> list[Tensor]:
        """[N] -> [N, 1, 1, 1] in float32, where the networks compute."""
        return [v.float().reshape(-1, 1, 1, 1).to(self.empty.device) for v in values]

    @staticmethod
    def output(denoiser: Any, x: Tensor, index: Tensor, embeds: Tensor) -> Tensor:
        """The network calls that the method makes, adapters on or off."""
        with denoiser.active():
            return denoiser.module(x, index, encoder_hidden_states=embeds, return_dict=False)[0]

    def guided(self, denoiser: Any, x: Tensor, index: Tensor, embeds: Tensor, w: Tensor | float) -> Tensor:
        """The same with guidance, both halves in one call."""
        both = torch.cat([embeds, self.empty.expand_as(embeds)])
        v, without = self.output(denoiser, torch.cat([x, x]), index.repeat(2), both).chunk(2)
        return v + w * (v - without)

    @abstractmethod
    def drawn(self, x0: Tensor, embeds: Tensor) -> Tensor:
        """The loss, with times and noise of PyTorch's own generator."""

    def steps(self, clock: Callable[[], float]) -> Iterator[float]:
        """Makes a step each time it is asked for one, with AdamW and clipping; what `clock` says that it took."""
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-2)
        while True:
            for chosen in torch.randperm(len(self.data[0])).split(self.batch):
                began = clock()
                with torch.enable_grad():
                    mean, std, embeds = (values[chosen].to(self.empty.device) for values in self.data)
                    loss = self.drawn(mean + std * torch.randn_like(mean), embeds)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    loss.item()  # nobody trains without a look at it
                yield clock() - began


class LCMByHand(ByHand):
    """Of LCM-LoRA with the method's default constants."""

    def __init__(self, method: LCM, data: tuple[Tensor, Tensor, Tensor], empty: Tensor, batch: int) -> None:
        super().__init__(method, data, empty, batch)
        self.method, self.config = method, method.config
        index = torch.cat([torch.arange(999, 0, -20), torch.zeros(1, dtype=torch.long)])  # 999, 979, ..., 19, 0
        scaled = self.config.timestep_scaling * index
        self.index = index.to(empty.device)
        self.alpha, self.sigma = self.factors(method.schedule.alpha(method.grid), method.schedule.sigma(method.grid))
        self.c_skip, self.c_out = self.factors(0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt())

    def jump(self, x: Tensor, k: Tensor, embeds: Tensor) -> Tensor:
        """The consistency function."""
        v = self.output(self.method.student, x, self.index[k], embeds)
        return self.c_skip[k] * x + self.c_out[k] * (self.alpha[k] * x - self.sigma[k] * v)

    def loss(self, x0: Tensor, noise: Tensor, k: Tensor, w: Tensor, embeds: Tensor) -> Tensor:
        """The method's loss at points k [B] of its grid with guidance w [B, 1, 1, 1]."""
        x_t = self.alpha[k] * x0 + self.sigma[k] * noise
        jump = self.jump(x_t, k, embeds)
        with torch.no_grad():
            v = self.guided(self.method.teacher, x_t, self.index[k], embeds, w)
            x0_hat, eps = self.alpha[k] * x_t - self.sigma[k] * v, self.alpha[k] * v + self.sigma[k] * x_t
            target = self.jump(self.alpha[k + 1] * x0_hat + self.sigma[k + 1] * eps, k + 1, embeds)
        return (((jump - target) ** 2 + self.config.huber_c**2).sqrt() - self.config.huber_c).mean()

    def drawn(self, x0: Tensor, embeds: Tensor) -> Tensor:
        low, high = self.config.w_min, self.config.w_max
        k = torch.randint(0, len(self.index) - 1, (len(x0),))
        w = low + (high - low) * torch.rand(len(x0), 1, 1, 1, device=x0.device)
        return self.loss(x0, torch.randn_like(x0), k, w, embeds)


class ProgressiveByHand(ByHand):
    """Of progressive distillation in the rung where the method is, one w for all, the error weighted by max(SNR, 1)."""

    def __init__(self, method: Progressive, data: tuple[Tensor, Tensor, Tensor], empty: Tensor, batch: int) -> None:
        super().__init__(method, data, empty, batch)
        self.method, self.w = method, None if method.copied else method.config.w_max
        points, self.rung = method.ladder[method.rung], method.steps
        self.k = points // self.rung
        self.index = torch.arange(999, -2, -1000 // points).to(empty.device)  # of 40 steps 999, 974, ..., 24, -1
        grid = torch.arange(points, -1, -1, dtype=torch.float64) / points
        alpha, sigma = method.schedule.alpha(grid), method.schedule.sigma(grid)
        before, after = slice(0, -1, self.k), slice(self.k, None, self.k)  # of each of the student's steps
        ratio = sigma[after] / sigma[before]
        self.alpha, self.sigma = self.factors(alpha, sigma)
        self.ratio, self.rest = self.factors(ratio, alpha[after] - ratio * alpha[before])
        self.weight = (alpha[before] / sigma[before]).square().clamp(min=1.0).float().to(empty.device)

    def taught(self, x: Tensor, n: Tensor, embeds: Tensor) -> Tensor:
        """The teacher's step from point n to n + 1 of its grid."""
        if self.w is None:
            v = self.output(self.method.teacher, x, self.index[n], embeds)
        else:
            v = self.guided(self.method.teacher, x, self.index[n], embeds, self.w)
        x0, eps = self.alpha[n] * x - self.sigma[n] * v, self.alpha[n] * v + self.sigma[n] * x
        return self.alpha[n + 1] * x0 + self.sigma[n + 1] * eps

    def loss(self, x0: Tensor, noise: Tensor, i: Tensor, embeds: Tensor) -> Tensor:
        """The method's loss of the student's steps i [B], 0 the first."""
        n = self.k * i
        x_t = self.alpha[n] * x0 + self.sigma[n] * noise
        with torch.no_grad():
            x = x_t
            for j in range(self.k):
                x = self.taught(x, n + j, embeds)
            wanted = (x - self.ratio[i] * x_t) / self.rest[i]
        v = self.output(self.method.student, x_t, self.index[n], embeds)
        error = (self.alpha[n] * x_t - self.sigma[n] * v - wanted).square().mean((1, 2, 3))
        return (self.weight[i] * error).mean()

    def drawn(self, x0: Tensor, embeds: Tensor) -> Tensor:
        return self.loss(x0, torch.randn_like(x0), torch.randint(0, self.rung, (len(x0),)), embeds)
