"""LCM-LoRA, progressive distillation and LADD as one writes them for a single v-predicting UNet with a table of 1000 levels.

PyTorch alone, nothing logged, saved or resumable: what the trainer's step is compared with. The `loss` of each loop is the
method's own to the last digits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.methods.ladd import LADD
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
        self, method: LCM | Progressive | LADD, data: tuple[Tensor, Tensor, Tensor], empty: Tensor, batch: int
    ) -> None:
        self.trained = {name: network.trainable() for name, network in method.networks().items() if network.trainable()}
        self.data, self.empty, self.batch = data, empty, batch

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
    def drawn(self, x0: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
        """What the losses are of: x0, times and noise of PyTorch's own generator, embeds last."""

    @abstractmethod
    def losses(self, *given: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(role, what its parameters minimise); each makes its step before the next is asked for."""

    def steps(self, clock: Callable[[], float]) -> Iterator[float]:
        """Makes a step each time it is asked for one, with AdamW and clipping; what `clock` says that it took."""
        optimizers = {name: torch.optim.AdamW(of, lr=1e-4, weight_decay=1e-2) for name, of in self.trained.items()}
        while True:
            for chosen in torch.randperm(len(self.data[0])).split(self.batch):
                began = clock()
                with torch.enable_grad():
                    mean, std, embeds = (values[chosen].to(self.empty.device) for values in self.data)
                    for role, loss in self.losses(*self.drawn(mean + std * torch.randn_like(mean), embeds)):
                        loss.backward()
                        torch.nn.utils.clip_grad_norm_(self.trained[role], 1.0)
                        optimizers[role].step()
                        optimizers[role].zero_grad()
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

    def losses(self, *given: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "student", self.loss(*given)

    def drawn(self, x0: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
        low, high = self.config.w_min, self.config.w_max
        k = torch.randint(0, len(self.index) - 1, (len(x0),))
        w = low + (high - low) * torch.rand(len(x0), 1, 1, 1, device=x0.device)
        return x0, torch.randn_like(x0), k, w, embeds


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

    def losses(self, *given: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "student", self.loss(*given)

    def drawn(self, x0: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
        return x0, torch.randn_like(x0), torch.randint(0, self.rung, (len(x0),)), embeds


class LADDByHand(ByHand):
    """Of LADD with the method's default constants: hinge, R1 on every step. Without the guard, which looks once in 50 steps."""

    def __init__(self, method: LADD, data: tuple[Tensor, Tensor, Tensor], empty: Tensor, batch: int) -> None:
        super().__init__(method, data, empty, batch)
        self.method, self.config, self.heads = method, method.config, method.discriminator.module
        grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
        self.alpha, self.sigma = self.factors(method.schedule.alpha(grid), method.schedule.sigma(grid))
        self.times = (1000 * method.times.grid).long() - 1
        self.chances = torch.tensor(method.times.warmup_probabilities, dtype=torch.float64)
        rates = torch.exp(-math.log(10_000.0) * torch.arange(32, dtype=torch.float64) / 32)
        self.known = torch.cat([(1000 * grid[:, None] * rates).sin(), (1000 * grid[:, None] * rates).cos()], 1).float()
        self.kept: dict[str, Tensor] = {}
        for name, module in method.teacher.module.named_modules():
            if name in method.features.names:
                module.register_forward_hook(lambda _, __, output, name=name: self.kept.update({name: output}))

    def made(self, x_t: Tensor, index: Tensor, embeds: Tensor) -> Tensor:
        """The student's x0."""
        v = self.output(self.method.student, x_t, index.to(x_t.device), embeds)
        return self.alpha[index] * x_t - self.sigma[index] * v

    def maps(self, x: Tensor, eps: Tensor, level: Tensor, embeds: Tensor) -> list[Tensor]:
        """The teacher's features of noised samples."""
        noised = self.alpha[level] * x + self.sigma[level] * eps
        self.output(self.method.teacher, noised, level.to(x.device), embeds)
        tokens = [self.kept[name].transpose(1, 2) for name in self.method.features.names]
        return [t.unflatten(2, (math.isqrt(t.shape[2]),) * 2) for t in tokens]

    def condition(self, level: Tensor, embeds: Tensor) -> Tensor:
        """What the heads are told."""
        pooled = nn.functional.layer_norm(embeds.mean(1), embeds.shape[2:])
        return torch.cat([self.known[level].to(embeds.device), pooled], 1)

    def losses(self, *given: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Of x0, x_t, index of its level, eps and level of what the heads see, embeds."""
        x0, x_t, index, eps, level, embeds = given
        condition = self.condition(level, embeds)
        with torch.no_grad():
            both = torch.cat([x0, self.made(x_t, index, embeds)])
            maps = self.maps(both, eps.repeat(2, 1, 1, 1), level.repeat(2), embeds.repeat(2, 1, 1))
        real = [part[: len(x0)].detach().requires_grad_(True) for part in maps]
        self.heads.requires_grad_(True)
        right, wrong = self.heads(real, condition), self.heads([part[len(x0) :] for part in maps], condition)
        hinge = [(1 - r).relu().mean() + (1 + w).relu().mean() for r, w in zip(right, wrong, strict=True)]
        slopes = [torch.autograd.grad(r.sum(), f, create_graph=True)[0].square().sum((1, 2, 3)).mean() / r.shape[1]
                  for r, f in zip(right, real, strict=True)]  # fmt: skip
        yield "discriminator", torch.stack(hinge).mean() + self.config.r1_gamma / 2 * torch.stack(slopes).mean()
        self.heads.requires_grad_(False)
        logits = self.heads(self.maps(self.made(x_t, index, embeds), eps, level, embeds), condition)
        yield "student", -torch.stack([part.mean() for part in logits]).mean()
        self.method.discriminator.advance()

    def drawn(self, x0: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
        which = torch.multinomial(self.chances, len(x0), replacement=True)
        index, noise = self.times[which], torch.randn_like(x0)
        noised = self.alpha[index] * x0 + self.sigma[index] * noise
        x_t = torch.where((which == 0).reshape(-1, 1, 1, 1).to(x0.device), noise, noised)
        z = self.config.noise_mean + self.config.noise_std * torch.randn(len(x0))
        return x0, x_t, index, torch.randn_like(x0), (1000 * z.sigmoid()).long().clamp(max=999), embeds
