"""Noise schedules: how much data and how much noise there is at time t.

Everywhere in stepdistill t is a float64 tensor [B] on the CPU, 0 is data, 1 is noise, and

    x_t = alpha(t) x0 + sigma(t) eps.                                                                   (forward process)

alpha and sigma are computed in float64 and cast once, in :meth:`NoiseSchedule.at`, to the latents' device and to float32
or better: MPS has no float64, and half precision cannot hold the t = 1 end of a schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def expand(factor: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] with as many axes as `like`, on its device, in max(float32, its dtype)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return factor.to(dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))


class NoiseSchedule(ABC):
    """alpha(t) and sigma(t) for t in [0, 1]; subclasses write these two and get the rest."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at t: [B] float64 -> [B] float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at t: [B] float64 -> [B] float64."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt) at t, each [B] float64, with a graph where t has one.

        By automatic differentiation here; the closed forms below also work under `torch.func` transforms.
        """
        again = torch.is_grad_enabled() and t.requires_grad
        with torch.enable_grad():
            t = t.double() if again else t.detach().double().requires_grad_(True)
            alpha, sigma = self.alpha(t) + 0.0 * t, self.sigma(t) + 0.0 * t  # 0 t: a constant scale has no graph
            (d_alpha,) = torch.autograd.grad(alpha.sum(), t, create_graph=again)
            (d_sigma,) = torch.autograd.grad(sigma.sum(), t, create_graph=again)
        return d_alpha, d_sigma

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, [B] float64; infinite where sigma is 0."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) shaped to multiply `like` [B, ...], on its device, in max(float32, its dtype)."""
        return expand(self.alpha(t), like), expand(self.sigma(t), like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps; x0 and eps [B, ...], t [B]."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def grid(self, steps: int) -> Tensor:
        """[steps + 1] times from 1 down to 0, evenly spaced."""
        if steps < 1:
            raise ValueError(f"expected steps >= 1, got {steps}; a sampler needs at least one step")
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


class Flow(NoiseSchedule):
    """The straight path of rectified flow (arXiv 2209.03003), as SD3 and Flux use it: alpha = 1 - t, sigma = t.

    Timestep shift belongs to grids and to the training-time distribution (:mod:`.timesteps`), never to the schedule.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one


class Cosine(NoiseSchedule):
    """Variance-preserving cosine schedule (arXiv 2102.09672 without its offset): alpha = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))  # = cos(pi t / 2), and exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * math.pi * self.sigma(t), 0.5 * math.pi * self.alpha(t)


class Tabulated(NoiseSchedule):
    """A discrete variance-preserving table of N levels (DDPM, arXiv 2006.11239), extended to continuous t.

    Level k = 0 .. N-1 sits at t = (k + 1) / N and is reproduced there exactly; t = 0 is clean data. Between the knots the
    angle atan2(sigma, alpha) is interpolated linearly, so that alpha^2 + sigma^2 = 1 everywhere, on tables that end at zero
    terminal SNR too.

    Args:
        alphas_cumprod: [N] values of alpha^2, strictly decreasing, in [0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"expected a table [N] with N >= 2, got shape {tuple(table.shape)}")
        if not bool((table[1:] < table[:-1]).all()) or float(table[0]) >= 1.0 or float(table[-1]) < 0.0:
            raise ValueError("expected alphas_cumprod strictly decreasing inside [0, 1); fix the scheduler's betas")
        self.levels = len(table)
        one = torch.ones(1, dtype=torch.float64)
        self._alphas = torch.cat([one, table.sqrt()])
        self._sigmas = torch.cat([0 * one, (1.0 - table).sqrt()])
        self._angles = torch.atan2(self._sigmas, self._alphas)

    def _position(self, t: Tensor) -> Tensor:
        """N t, put on the nearest knot where only the rounding of (k + 1) / N * N keeps it off; the gradient stays N."""
        position = t.double() * self.levels
        off = (position.round() - position).detach()
        return position + torch.where(off.abs() < 1e-9, off, 0.0)  # 1e-9 of a knot is no time that means something

    def _left(self, position: Tensor) -> Tensor:
        """The knot that begins the segment of this position: on a knot the segment after it, at t = 1 the last one."""
        return position.detach().floor().long().clamp(0, self.levels - 1)

    def _angle(self, position: Tensor) -> Tensor:
        left = self._left(position)
        return torch.lerp(self._angles[left], self._angles[left + 1], position - left)

    @staticmethod
    def _exact(value: Tensor, table: Tensor, position: Tensor) -> Tensor:
        """`value`, replaced by the table's own number on a knot; the gradient stays that of `value`."""
        knot = position.detach().round().long().clamp(0, len(table) - 1)
        return value + torch.where(position.detach() == knot, table[knot] - value.detach(), 0.0)

    def alpha(self, t: Tensor) -> Tensor:
        position = self._position(t)
        return self._exact(torch.cos(self._angle(position)), self._alphas, position)

    def sigma(self, t: Tensor) -> Tensor:
        position = self._position(t)
        return self._exact(torch.sin(self._angle(position)), self._sigmas, position)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        left = self._left(self._position(t))
        slope = (self._angles[left + 1] - self._angles[left]) * self.levels
        return -slope * self.sigma(t), slope * self.alpha(t)

    def index(self, t: Tensor) -> Tensor:
        """The native fractional timestep N t - 1 that a DDPM-trained network takes, [B] float64; whole on the knots."""
        return self._position(t) - 1.0

    def time(self, index: Tensor) -> Tensor:
        """Inverse of :meth:`index`: native timestep -> t, [B] float64."""
        return (torch.as_tensor(index).double() + 1.0) / self.levels

    @property
    def zero_terminal_snr(self) -> bool:
        """True if the last level is pure noise (alpha = 0)."""
        return float(self._alphas[-1]) == 0.0
