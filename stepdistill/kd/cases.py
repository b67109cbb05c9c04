"""Batches that the conformance suite puts to an implementation, the definition they are held against, and how far off it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapter, Case

B, S, V, H, H_T = 4, 6, 17, 5, 7
LENGTHS = (6, 2, 5, 1)  # valid tokens of the sequences


def drawn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(entries: tuple[int, int] = (V, V), **changes: Any) -> Case:
    """A batch of four sequences of unequal lengths."""
    mask = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
    student, teacher = entries
    tensors = drawn(B, S, H, seed=0), drawn(student, H, seed=1), drawn(B, S, H_T, seed=2), drawn(teacher, H_T, seed=3)
    return replace(Case(*tensors, mask), **changes)


def logits_case(student: Tensor, teacher: Tensor, **changes: Any) -> Case:
    """Of logits [B, S, V]: the heads are the identity."""
    unit = torch.eye(student.shape[-1])
    mask = torch.ones(student.shape[:2], dtype=torch.bool)
    return replace(Case(student, unit, teacher, unit, mask), **changes)


def evaluated(adapter: Adapter, given: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden states, of the head), detached."""
    student, weight = (x.detach().clone().requires_grad_() for x in (given.student, given.weight))
    loss = adapter.loss(replace(given, student=student, weight=weight))
    to_student, to_weight = torch.autograd.grad(loss, (student, weight))
    return loss.detach(), to_student, to_weight


def reference(given: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the definition, in float64, over the entries that both have."""
    student, weight = (x.detach().double().requires_grad_() for x in (given.student, given.weight))
    shared, t, beta = min(len(given.weight), len(given.teacher_weight)), given.temperature, given.beta
    q = torch.softmax((student @ weight.t())[..., :shared][given.mask] / t, -1)
    p = torch.softmax((given.teacher.double() @ given.teacher_weight.double().t())[..., :shared][given.mask] / t, -1)
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    whole = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    loss = t**2 * whole / (given.items or given.mask.sum())
    to_student, to_weight = torch.autograd.grad(loss, (student, weight))
    return loss.detach(), to_student, to_weight


def apart(found: Any, wanted: Any) -> float:
    """The largest |found - wanted| / |wanted| of several tensors, in the 2-norm; infinity for what is not finite."""
    ratios = []
    for a, b in zip(found, wanted, strict=True):
        ratio = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        ratios.append(ratio if math.isfinite(ratio) else math.inf)
    return max(ratios)


def largest(values: Any) -> float:
    """The largest absolute value of several tensors; infinity where one is not finite."""
    return max(float(v.abs().max()) if bool(v.isfinite().all()) else math.inf for v in values)
