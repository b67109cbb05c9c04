"""Teachers whose answers are known in closed form, so that any method can be checked against the truth on a laptop.

Where the data are Gaussian (or a mixture of Gaussians), everything one can ask of a perfect network is a formula: its
prediction, the score, the probability-flow ODE's map between any two times, one DDIM step. With data N(m, s^2) and
v_t = alpha_t^2 s^2 + sigma_t^2:

    E[x0 | x_t] = m + (alpha_t s^2 / v_t) (x_t - alpha_t m)          score = -(x_t - alpha_t m) / v_t
    G(x_t; t -> u) = alpha_u m + sqrt(v_u / v_t) (x_t - alpha_t m)                              (the exact ODE map)

The classes work with every schedule and prediction kind, in float32 and float64, pass gradients to x_t and t, hold no
weights, and expose the taps `x0` and `eps`. Use m != 0 and s in about (0.2, 0.5): with m = 0, s = 1 the ODE map of a
variance-preserving schedule is the identity, and every wrong solver passes.

:class:`LinearStudent` is the matching student: one affine map a grid point, which is all that a perfect student of a
Gaussian teacher needs, so a method's fixed point can be read off its parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..diffusion.prediction import Kind, target
from ..diffusion.schedule import NoiseSchedule, expand
from ..networks.denoiser import Denoiser


def _wide(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Readout(nn.Module):
    """(x0, eps) -> the output of a prediction kind. The two pass through modules of their own, to be tapped."""

    def __init__(self, schedule: NoiseSchedule, predicts: Kind) -> None:
        super().__init__()
        self.schedule, self.predicts = schedule, predicts
        self.x0, self.eps = nn.Identity(), nn.Identity()

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return target(self.predicts, self.schedule, self.x0(x0), self.eps(eps), t)


class Analytic(Denoiser, ABC):
    """The perfect denoiser of a known data distribution; subclasses write its posterior mean, score and ODE map.

    In all methods x_t is [B, ...] and t, u are [B] float64; `cond` matters to :class:`TwoClass` only.
    """

    tap_points = ("x0", "eps")

    def __init__(self, schedule: NoiseSchedule, predicts: Kind) -> None:
        super().__init__(_Readout(schedule, predicts), schedule, predicts)

    @abstractmethod
    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """E[x0 | x_t], [B, ...] in float32 or better."""

    @abstractmethod
    def score(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The gradient of log p_t at x_t, [B, ...] in float32 or better."""

    @abstractmethod
    def exact_map(self, x_t: Tensor, t: Tensor, u: Tensor, cond: Cond | None = None) -> Tensor:
        """G(x_t; t -> u): where the probability-flow ODE takes x_t from t to u, [B, ...] in float32 or better."""

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        eps = -expand(self.schedule.sigma(t), x_t) * self.score(x_t, t, cond)  # eps = -sigma score, any distribution
        return self.net(self.posterior_mean(x_t, t, cond), eps, t)


class Gaussian(Analytic):
    """Data N(mean, std^2 I) of any shape.

    Args:
        mean: a number, or a tensor of the trailing shape of x_t (or what broadcasts to it).
        std: > 0.
    """

    def __init__(self, mean: float | Tensor, std: float, schedule: NoiseSchedule, predicts: Kind = "eps") -> None:
        super().__init__(schedule, predicts)
        if not std > 0:
            raise ValueError(f"expected std > 0, got {std}; a point mass has no score at t = 0")
        self.mean, self.std = torch.as_tensor(mean, dtype=torch.float64), float(std)

    def variance(self, t: Tensor) -> Tensor:
        """v_t = alpha^2 s^2 + sigma^2, the variance of x_t; [B] float64."""
        return (self.schedule.alpha(t) * self.std) ** 2 + self.schedule.sigma(t) ** 2

    def _centre(self, x_t: Tensor, t: Tensor) -> Tensor:
        """alpha_t m, the mean of x_t."""
        return expand(self.schedule.alpha(t), x_t) * self.mean.to(_wide(x_t))

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        gain = self.schedule.alpha(t) * self.std**2 / self.variance(t)
        return self.mean.to(_wide(x_t)) + expand(gain, x_t) * (x_t - self._centre(x_t, t))

    def score(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return -(x_t - self._centre(x_t, t)) / expand(self.variance(t), x_t)

    def exact_map(self, x_t: Tensor, t: Tensor, u: Tensor, cond: Cond | None = None) -> Tensor:
        ratio = (self.variance(u) / self.variance(t)).sqrt()
        return self._centre(x_t, u) + expand(ratio, x_t) * (x_t - self._centre(x_t, t))

    def ddim_multiplier(self, t: Tensor, u: Tensor) -> Tensor:
        """k(t -> u) = (alpha_u alpha_t s^2 + sigma_u sigma_t) / v_t, [B] float64.

        One DDIM step takes x_t to alpha_u m + k (x_t - alpha_t m), so a chain of steps multiplies by the product of the k's.
        """
        alpha = self.schedule.alpha(u) * self.schedule.alpha(t)
        sigma = self.schedule.sigma(u) * self.schedule.sigma(t)
        return (alpha * self.std**2 + sigma) / self.variance(t)


class TwoClass(Analytic):
    """Labelled Gaussians of equal variance, and an unconditional Gaussian of that variance: the truth for guidance.

    Equal variances make classifier-free guidance a shift of the mean: cond + w (cond - uncond) is the perfect prediction for
    N(m_c + w (m_c - m_u), s^2), see :meth:`guided`. (The marginal of two classes is no Gaussian; N(m_u, s^2) stands for it.)

    Args:
        means: one number a class.
        std: > 0, of all of them.
        uncond_mean: m_u; by default the average of `means`.

    Every call needs cond["label"], [B] int64: a class, or -1 for unconditional.
    """

    def __init__(
        self,
        means: Sequence[float],
        std: float,
        schedule: NoiseSchedule,
        predicts: Kind = "eps",
        uncond_mean: float | None = None,
    ) -> None:
        super().__init__(schedule, predicts)
        self.means = tuple(float(m) for m in means)
        self.uncond_mean = sum(self.means) / len(self.means) if uncond_mean is None else float(uncond_mean)
        # the unconditional one is last, where label -1 finds it
        self._gaussians = [Gaussian(m, std, schedule, predicts) for m in (*self.means, self.uncond_mean)]

    def _pick(self, cond: Cond | None, answers: list[Tensor]) -> Tensor:
        """For each sample the answer of the Gaussian that its label names; [B, ...] each -> [B, ...]."""
        if cond is None or "label" not in cond:
            raise ValueError('expected cond["label"], [B] int64, got none; -1 is unconditional')
        label = cond["label"]
        if bool(((label < -1) | (label >= len(self.means))).any()):
            raise ValueError(f"expected labels in [-1, {len(self.means)}), got {label.tolist()}")
        return torch.stack(answers)[label, torch.arange(len(label), device=label.device)]

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return self._pick(cond, [g.posterior_mean(x_t, t) for g in self._gaussians])

    def score(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return self._pick(cond, [g.score(x_t, t) for g in self._gaussians])

    def exact_map(self, x_t: Tensor, t: Tensor, u: Tensor, cond: Cond | None = None) -> Tensor:
        return self._pick(cond, [g.exact_map(x_t, t, u) for g in self._gaussians])

    def guided(self, label: int, w: float) -> Gaussian:
        """The Gaussian whose predictions are cond + w (cond - uncond) for this class; w = guidance_scale - 1."""
        mean = self.means[label] + w * (self.means[label] - self.uncond_mean)
        return Gaussian(mean, self._gaussians[-1].std, self.schedule, self.predicts)


class Mixture(Analytic):
    """Every element of x0 an independent draw from sum_k weights_k N(means_k, stds_k^2): a truth that is not linear.

    In one dimension the probability-flow ODE preserves quantiles, so its exact map is G = F_u^-1(F_t(x)).

    Args:
        means, stds, weights: one number a component; the weights are normalised.
    """

    def __init__(
        self,
        means: Sequence[float],
        stds: Sequence[float],
        weights: Sequence[float],
        schedule: NoiseSchedule,
        predicts: Kind = "eps",
    ) -> None:
        super().__init__(schedule, predicts)
        if not len(means) == len(stds) == len(weights) or not means or min(stds) <= 0 or min(weights) <= 0:
            raise ValueError(f"expected as many means, stds > 0 and weights > 0, got {means}, {stds}, {weights}")
        self.means, self.stds, weight = (torch.as_tensor(v, dtype=torch.float64) for v in (means, stds, weights))
        self.log_weights = (weight / weight.sum()).log()

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha means, variances) of x_t's components, shaped [B, 1, ..., 1, K] against x_t[..., None]."""
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        shape = (-1, *[1] * (x_t.ndim - 1), len(self.means))
        centres, variances = alpha * self.means, (alpha * self.stds) ** 2 + sigma**2
        return centres.reshape(shape).to(_wide(x_t)), variances.reshape(shape).to(_wide(x_t))

    def _responsibilities(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(component | x_t), x_t - alpha m_k and v_k, [B, ..., K]."""
        centres, variances = self._components(x_t, t)
        offset = x_t[..., None] - centres
        logits = self.log_weights.to(offset) - 0.5 * variances.log() - 0.5 * offset.square() / variances
        return logits.softmax(-1), offset, variances

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        share, offset, variances = self._responsibilities(x_t, t)
        gain = expand(self.schedule.alpha(t), offset) * self.stds.square().to(offset) / variances
        return (share * (self.means.to(offset) + gain * offset)).sum(-1)

    def score(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        share, offset, variances = self._responsibilities(x_t, t)
        return -(share * offset / variances).sum(-1)

    def _log_tails(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log F_t(x), log(1 - F_t(x)), both exact in their own tail, and z_k = (x - alpha m_k) / sqrt(v_k)."""
        centres, variances = self._components(x, t)
        z = (x[..., None] - centres) / variances.sqrt()
        below = (self.log_weights + torch.special.log_ndtr(z)).logsumexp(-1)
        above = (self.log_weights + torch.special.log_ndtr(-z)).logsumexp(-1)
        return below, above, z

    @torch.no_grad()
    def exact_map(self, x_t: Tensor, t: Tensor, u: Tensor, cond: Cond | None = None) -> Tensor:
        """F_u^-1(F_t(x_t)) by bisection in float64, without gradients; matches whichever tail is the smaller."""
        x = x_t.double().cpu()
        below, above, z = self._log_tails(x, t)
        centres, variances = self._components(x, u)
        # F_t(x) lies between Phi(min z) and Phi(max z), hence the answer between the components' quantiles of those
        low = (centres + variances.sqrt() * z.amin(-1, keepdim=True)).amin(-1)
        high = (centres + variances.sqrt() * z.amax(-1, keepdim=True)).amax(-1)
        for _ in range(80):  # halves the bracket to below float64's resolution
            middle = 0.5 * (low + high)
            below_u, above_u, _ = self._log_tails(middle, u)
            too_low = torch.where(below < above, below_u < below, above_u > above)
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return (0.5 * (low + high)).to(_wide(x_t))


class _AffineTable(nn.Module):
    """weight[index] x_t + bias[index]."""

    def __init__(self, points: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(points)), nn.Parameter(torch.zeros(points, *shape))

    def forward(self, x_t: Tensor, index: Tensor) -> Tensor:
        index = index.to(self.weight.device)
        bias = self.bias[index]
        bias = bias.reshape(len(index), *[1] * (x_t.ndim - bias.ndim), *bias.shape[1:])
        return expand(self.weight[index], x_t) * x_t + bias


class LinearStudent(Denoiser):
    """A trainable denoiser whose output is weight_k x_t + bias_k at the k-th time of a grid.

    A perfect student of a :class:`Gaussian` teacher is of this form, whatever the method, so training one and comparing
    its parameters (or its maps) with the closed form checks a method from loss to fixed point. `cond` is ignored.

    Args:
        grid: [N] times at which it can be called; other times raise ValueError.
        shape: trailing shape of the bias; () for one number, the mean of a Gaussian with a scalar mean.

    Starts at zero; see :meth:`imitate`.
    """

    def __init__(self, grid: Tensor, schedule: NoiseSchedule, predicts: Kind = "x0", shape: Sequence[int] = ()) -> None:
        super().__init__(_AffineTable(len(grid), shape), schedule, predicts)
        self.grid, self.shape = grid.double(), tuple(shape)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        distance, index = (t.double()[:, None] - self.grid).abs().min(1)
        if bool((distance > 1e-6).any()):
            raise ValueError(
                f"expected times on this student's grid, got {t[distance > 1e-6].tolist()}; give it a finer grid"
            )
        return self.net(x_t, index)

    @torch.no_grad()
    def imitate(self, teacher: Denoiser, cond: Cond | None = None) -> Self:
        """Takes over the outputs of a teacher that is affine in x_t and predicts the same kind; returns self.

        Args:
            cond: what the teacher is conditioned on, [N, ...] each, one row a grid point.
        """
        if teacher.predicts != self.predicts:
            raise ValueError(f"expected a teacher that predicts {self.predicts!r}, got {teacher.predicts!r}")
        table = cast(_AffineTable, self.module)
        zeros = torch.zeros(len(self.grid), *self.shape, dtype=torch.float64)
        at_zero, at_one = (teacher.call(x, self.grid, cond or {}) for x in (zeros, zeros + 1.0))
        table.bias.copy_(at_zero)
        table.weight.copy_((at_one - at_zero).flatten(1).mean(1) if self.shape else at_one - at_zero)
        return self
