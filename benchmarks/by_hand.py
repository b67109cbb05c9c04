"""LCM-LoRA as one writes it for a single v-predicting UNet: PyTorch alone, nothing logged, saved or resumable.

What the trainer's step is compared with; :meth:`ByHand.loss` gives the method's own loss to the last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stepdistill.methods.lcm import LCM


class ByHand:
    """The loop.

    Args:
        method: whose networks, schedule and constants are used; none of its code.
        data: mean and std of latents [N, C, h, w], prompt_embeds [N, L, D] of their captions.
        empty: [1, L, D] embedding of no prompt.
        batch: images a step.
    """

    def __init__(self, method: LCM, data: tuple[Tensor, Tensor, Tensor], empty: Tensor, batch: int) -> None:
        self.method, self.config, self.data, self.batch = method, method.config, data, batch
        self.empty, device = empty, empty.device
        index = torch.cat([torch.arange(999, 0, -20), torch.zeros(1, dtype=torch.long)])  # 999, 979, ..., 19, 0
        alpha, sigma = method.schedule.alpha(method.grid), method.schedule.sigma(method.grid)
        scaled = self.config.timestep_scaling * index
        factors = alpha, sigma, 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        self.index = index.to(device)
        self.alpha, self.sigma, self.c_skip, self.c_out = (v.float().reshape(-1, 1, 1, 1).to(device) for v in factors)

    def output(self, denoiser: Any, x: Tensor, k: Tensor, embeds: Tensor) -> Tensor:
        """The network calls that the method makes, adapters on or off."""
        with denoiser.active():
            return denoiser.module(x, self.index[k], encoder_hidden_states=embeds, return_dict=False)[0]

    def jump(self, x: Tensor, k: Tensor, embeds: Tensor) -> Tensor:
        """The consistency function."""
        v = self.output(self.method.student, x, k, embeds)
        return self.c_skip[k] * x + self.c_out[k] * (self.alpha[k] * x - self.sigma[k] * v)

    def loss(self, x0: Tensor, noise: Tensor, k: Tensor, w: Tensor, embeds: Tensor) -> Tensor:
        """The method's loss at points k [B] of its grid with guidance w [B, 1, 1, 1]."""
        x_t = self.alpha[k] * x0 + self.sigma[k] * noise
        jump = self.jump(x_t, k, embeds)
        with torch.no_grad():
            both = torch.cat([embeds, self.empty.expand_as(embeds)])
            v, without = self.output(self.method.teacher, torch.cat([x_t, x_t]), k.repeat(2), both).chunk(2)
            v = v + w * (v - without)
            x0_hat, eps = self.alpha[k] * x_t - self.sigma[k] * v, self.alpha[k] * v + self.sigma[k] * x_t
            target = self.jump(self.alpha[k + 1] * x0_hat + self.sigma[k + 1] * eps, k + 1, embeds)
        return (((jump - target) ** 2 + self.config.huber_c**2).sqrt() - self.config.huber_c).mean()

    def steps(self, clock: Callable[[], float]) -> Iterator[float]:
        """Makes a step each time it is asked for one, with AdamW and clipping; what `clock` says that it took."""
        parameters, device = self.method.student.trainable(), self.empty.device
        low, high = self.config.w_min, self.config.w_max
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
        while True:
            for chosen in torch.randperm(len(self.data[0])).split(self.batch):
                began = clock()
                with torch.enable_grad():
                    mean, std, embeds = (values[chosen].to(device) for values in self.data)
                    k = torch.randint(0, len(self.index) - 1, (len(chosen),))
                    w = low + (high - low) * torch.rand(len(chosen), 1, 1, 1, device=device)
                    x0 = mean + std * torch.randn_like(mean)
                    loss = self.loss(x0, torch.randn_like(x0), k, w, embeds)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    loss.item()  # nobody trains without a look at it
                yield clock() - began
