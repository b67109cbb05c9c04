"""What a network's output means: every target is a x0 + b eps, so reading one back is a 2x2 solve.

kind    a          b
eps     0          1           noise (DDPM, arXiv 2006.11239)
x0      1          0           data
v       -sigma     alpha       velocity on the circle (arXiv 2202.00512, appendix D)
flow    alpha'     sigma'      dx_t/dt at fixed (x0, eps); eps - x0 on :class:`Flow` (arXiv 2210.02747)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .schedule import NoiseSchedule, expand

Kind = Literal["eps", "x0", "v", "flow"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Prediction:
    """A network's opinion on (x0, eps), given x_t; either is solved when it is first asked for.

    Solving lazily means that x0 at sigma = 0 and eps at alpha = 0 never divide by zero unless somebody asks for a
    quantity that x_t and the output do not determine. That raises. Whether gradients flow was decided when the prediction
    was made, so a first look inside `no_grad` (for a metric) does not cut the graph for the loss.

    Attributes:
        x0: [B, ...] clean data, in float32 or better.
        eps: [B, ...] noise, in float32 or better.
    """

    def __init__(self, x0: Tensor | None = None, eps: Tensor | None = None, *, solve: _Solve | None = None) -> None:
        if solve is None and (x0 is None or eps is None):
            raise ValueError("expected both x0 and eps; use read() to derive them from a network's output")
        self._x0, self._eps, self._solve = x0, eps, solve

    @property
    def x0(self) -> Tensor:
        if self._x0 is None:
            assert self._solve is not None
            with torch.set_grad_enabled(self._solve.with_graph):
                self._x0 = self._solve.x0()
        return self._x0

    @property
    def eps(self) -> Tensor:
        if self._eps is None:
            assert self._solve is not None
            with torch.set_grad_enabled(self._solve.with_graph):
                self._eps = self._solve.eps()
        return self._eps

    def detach(self) -> Prediction:
        """The same prediction without gradients; both quantities are solved."""
        return Prediction(self.x0.detach(), self.eps.detach())

    def chunk(self, parts: int) -> list[Prediction]:
        """Splits the batch into equal parts (conditional and unconditional halves of one forward); both are solved."""
        pairs = zip(self.x0.chunk(parts), self.eps.chunk(parts), strict=True)
        return [Prediction(x0, eps) for x0, eps in pairs]


def coefficients(kind: Kind, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each [B] float64, with target = a x0 + b eps at times t [B]."""
    t = t.double()
    if kind == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if kind == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if kind == "v":
        return -schedule.sigma(t), schedule.alpha(t)
    if kind == "flow":
        return schedule.rates(t)
    raise ValueError(f"expected a prediction kind in {KINDS}, got {kind!r}")


def determines(kind: Kind, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Whether x_t and an output of this kind determine x0 and eps at t; [B] -> [B] bool. eps does not at alpha = 0."""
    a, b = coefficients(kind, schedule, t)
    return a * schedule.sigma(t) - b * schedule.alpha(t) != 0


def target(kind: Kind, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network of this kind should put out: a x0 + b eps. x0, eps [B, ...], t [B]."""
    a, b = coefficients(kind, schedule, t)
    return expand(a, x0) * x0 + expand(b, x0) * eps


class _Solve:
    """The system  [a b; alpha sigma] [x0; eps] = [output; x_t]  by Cramer's rule, in float64 factors."""

    def __init__(self, kind: Kind, schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor) -> None:
        self.kind, self.t = kind, t
        self.a, self.b = coefficients(kind, schedule, t)
        self.alpha, self.sigma = schedule.alpha(t.double()), schedule.sigma(t.double())
        self.determinant = self.a * self.sigma - self.b * self.alpha
        dtype = torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32)
        self.output, self.x_t = output.to(dtype), x_t.to(dtype)
        self.with_graph = torch.is_grad_enabled()

    def _combine(self, of_output: Tensor, of_x_t: Tensor) -> Tensor:
        if not bool((self.determinant.abs() > 0).all()):
            bad = self.t[self.determinant == 0][0].item()
            raise ValueError(
                f"kind {self.kind!r} does not determine x0 and eps at t = {bad:g} (0/0 there); "
                "use v, x0 or flow prediction at alpha = 0, eps, v or flow at sigma = 0, or another t"
            )
        weights = of_output / self.determinant, of_x_t / self.determinant
        return expand(weights[0], self.x_t) * self.output + expand(weights[1], self.x_t) * self.x_t

    def x0(self) -> Tensor:
        if self.kind == "x0":
            return self.output
        return self._combine(self.sigma, -self.b)

    def eps(self) -> Tensor:
        if self.kind == "eps":
            return self.output
        return self._combine(-self.alpha, self.a)


def read(kind: Kind, schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
    """A network's output [B, ...] at x_t [B, ...] and t [B] as a :class:`Prediction`.

    Half-precision outputs are upcast first: near t = 1 an eps error is amplified by sigma / alpha (x14.6 on Stable
    Diffusion's table). Asking for x0 of an eps output at alpha = 0, or eps of an x0 output at sigma = 0, raises ValueError;
    so does a t outside [0, 1], such as a native timestep.
    """
    outside = ~((t > -1e-9) & (t < 1.0 + 1e-9))  # the slack is for rounding in grids
    if bool(outside.any()):
        raise ValueError(
            f"expected times in [0, 1] with t = 1 noise, got {t[outside][0].item():g}; "
            "native timestep k of N levels is t = (k + 1) / N"
        )
    return Prediction(solve=_Solve(kind, schedule, output, x_t, t))
