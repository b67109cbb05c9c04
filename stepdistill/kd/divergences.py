"""Divergences between the next-token distributions of a student q and a teacher p, with their gradients.

Hinton et al. (arXiv 1503.02531), GKD (arXiv 2306.13649), DistiLLM (arXiv 2402.03898). Everything here is per token: [..., V]
logits or log-probabilities in, [...] out. What is summed over which tokens is the matter of :mod:`.reduction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
"""A divergence by name; :class:`Divergence` says what each is."""

LOWEST = -1e30  # of a log-probability: a logit of -inf then counts 0 x LOWEST = 0, where 0 x -inf would be NaN


@dataclass(frozen=True)
class Divergence:
    """T^2 D(p_T, q_T) of teacher p_T = softmax(z_T / T) and student q_T = softmax(z_S / T), per token.

        forward_kl        KL(p||q)                                                  mass-covering
        reverse_kl        KL(q||p)                                                  mode-seeking
        jsd               beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q     (arXiv 2306.13649, section 2)
        skew_kl           KL(p || alpha p + (1 - alpha) q)                          (arXiv 2402.03898, section 3.1)
        skew_reverse_kl   KL(q || (1 - alpha) p + alpha q)                          (the same)
        tvd               1/2 sum |p - q|, whose gradient jumps at p = q

    Attributes:
        kind: which of them.
        beta: of jsd, in [0, 1]. jsd goes to 0 as beta does (beta = 0.001 has a thousandth of a gradient, it is not "almost
            KL"), and so it does at 1, while exactly 0 means forward_kl and exactly 1 reverse_kl, as is usual.
        alpha: of skew_kl and skew_reverse_kl, in [0, 1): the share of the divergence's own first argument in the mixture.
        temperature: T; 1 is what models are sampled at.
        normalised: jsd divided by beta (1 - beta), which does go to the KLs at both ends and is of their size between.
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    normalised: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(
                f"expected a divergence in {get_args(Kind)}, got {self.kind!r}; fix --method.divergence.kind"
            )
        if not 0.0 <= self.beta <= 1.0:
            raise InputError(f"expected beta in [0, 1], got {self.beta}; fix --method.divergence.beta")
        if not 0.0 <= self.alpha < 1.0:
            raise InputError(
                f"expected alpha in [0, 1), got {self.alpha} (at 1 it has no student left); fix --method.divergence.alpha"
            )
        if not 0.0 < self.temperature < math.inf:
            raise InputError(f"expected a temperature > 0, got {self.temperature}; fix --method.divergence.temperature")
        if self.normalised and self.kind != "jsd":
            raise InputError(f"expected normalised with jsd alone, got {self.kind}; fix --method.divergence.normalised")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[..., V_S] and [..., V_T] logits -> [...], in float32 (float64 stays). The teacher gets no gradient.

        Where V_S and V_T differ (one tokenizer, tables padded differently) both are restricted to the entries that they share
        and renormalised.
        """
        log_q, log_p = self.log_probs(student_logits, teacher_logits)
        return self.temperature**2 * self.value(log_q, log_p)

    def log_probs(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """(log q_T, log p_T) over the shared entries; the second without a graph."""
        if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
            raise ValueError(
                f"expected logits of the same tokens, got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
            )
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        q, p = student_logits[..., :shared], teacher_logits[..., :shared].detach()
        return log_probs(q, self.temperature), log_probs(p, self.temperature)

    def value(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """D of log-probabilities [..., V] -> [...], without T^2; differentiable any number of times."""
        return _VALUES[self._pure](self, log_q, log_p)

    def value_and_gradient(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """(T^2 D [...], its gradient [..., V] with respect to the student's logits z_S, before they are divided by T).

        In closed form, without a graph. T^2 / T leaves a factor T in the gradient.
        """
        with torch.no_grad():
            value, gradient = _GRADIENTS[self._pure](self, log_q, log_p)
            if self.temperature != 1.0:
                value, gradient = value.mul_(self.temperature**2), gradient.mul_(self.temperature)
        return value, gradient

    @property
    def _pure(self) -> Kind:
        """The kind, or the plain KL that it is at an end of its parameter, where a mixture would lose small probabilities."""
        if (self.kind == "jsd" and self.beta == 0.0) or (self.kind == "skew_kl" and self.alpha == 0.0):
            return "forward_kl"
        if (self.kind == "jsd" and self.beta == 1.0) or (self.kind == "skew_reverse_kl" and self.alpha == 0.0):
            return "reverse_kl"
        return self.kind

    @property
    def scale(self) -> float:
        """1, or 1 / (beta (1 - beta)) of the normalised jsd."""
        return 1.0 / (self.beta * (1.0 - self.beta)) if self.normalised and self._pure == "jsd" else 1.0


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T) over the last axis, in float32 at least; [..., V] -> [..., V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature == 1.0 else wide / temperature
    return torch.log_softmax(scaled, -1).clamp(min=LOWEST)


def _log_mixture(share: float, a: Tensor, b: Tensor) -> Tensor:
    """log(share a + (1 - share) b). What underflows in both has no weight in any sum, but its logarithm must be finite."""
    return torch.lerp(b, a, share).clamp(min=torch.finfo(a.dtype).tiny).log()


def _over(a: Tensor, values: Tensor) -> Tensor:
    """The expectation of values under a; [..., V] each -> [...]."""
    return (a * values).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a||b)."""
    return _over(log_a.exp(), log_a - log_b)


def _jsd(d: Divergence, log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = _log_mixture(d.beta, log_p.exp(), log_q.exp())
    return d.scale * (d.beta * _kl(log_p, log_m) + (1.0 - d.beta) * _kl(log_q, log_m))


def _tvd(d: Divergence, log_q: Tensor, log_p: Tensor) -> Tensor:
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


_VALUES: dict[Kind, Callable[[Divergence, Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda d, log_q, log_p: _kl(log_p, log_q),
    "reverse_kl": lambda d, log_q, log_p: _kl(log_q, log_p),
    "jsd": _jsd,
    "skew_kl": lambda d, log_q, log_p: _kl(log_p, _log_mixture(d.alpha, log_p.exp(), log_q.exp())),
    "skew_reverse_kl": lambda d, log_q, log_p: _kl(log_q, _log_mixture(d.alpha, log_q.exp(), log_p.exp())),
    "tvd": _tvd,
}

# Gradients with respect to z_S all have the form q (g - sum q g), g = dD/dq up to a constant: the softmax's Jacobian.


def _centred(q: Tensor, g: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(sum q g [...], factor q (g - sum q g) [..., V]); g is overwritten by the second."""
    mean = _over(q, g)
    gradient = g.sub_(mean.unsqueeze(-1)).mul_(q)
    return mean, gradient if factor == 1.0 else gradient.mul_(factor)


def _forward_kl_gradient(d: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return _over(p, log_p - log_q), log_q.exp().sub_(p)  # q - p


def _reverse_kl_gradient(d: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    return _centred(log_q.exp(), log_q - log_p)  # q (log q - log p - RKL)


def _jsd_gradient(d: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    log_m = _log_mixture(d.beta, p, q)
    kl_p = _over(p, log_p - log_m)
    kl_q, gradient = _centred(q, log_q - log_m, d.scale * (1.0 - d.beta))  # (1 - beta) q (log q - log m - KL(q||m))
    return d.scale * (d.beta * kl_p + (1.0 - d.beta) * kl_q), gradient


def _skew_kl_gradient(d: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    log_m = _log_mixture(d.alpha, p, q)
    _, gradient = _centred(q, p / log_m.exp(), d.alpha - 1.0)  # -(1 - alpha) q (r - sum q r), r = p / m
    return _over(p, log_p - log_m), gradient


def _skew_reverse_kl_gradient(d: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    log_m = _log_mixture(d.alpha, q, log_p.exp())
    h = log_q - log_m
    value = _over(q, h)
    return value, _centred(q, h.sub_(q / log_m.exp(), alpha=d.alpha))[
        1
    ]  # q (h - sum q h), h = log(q / m) - alpha q / m


def _tvd_gradient(d: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = q - log_p.exp()
    value = 0.5 * difference.abs().sum(-1)
    return value, _centred(q, difference.sign_(), 0.5)[1]  # 1/2 q (s - sum q s), s = sign(q - p)


_GRADIENTS: dict[Kind, Callable[[Divergence, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl_gradient,
    "reverse_kl": _reverse_kl_gradient,
    "jsd": _jsd_gradient,
    "skew_kl": _skew_kl_gradient,
    "skew_reverse_kl": _skew_reverse_kl_gradient,
    "tvd": _tvd_gradient,
}
