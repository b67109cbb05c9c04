"""The losses of :mod:`.reduction` from hidden states and the weights of the output layers, without the logits [N, V].

A chunk of valid tokens at a time: logits, log-softmax, the gradient in closed form (:mod:`.divergences`), and from it the
gradients of hidden states and weights, summed in float32. All of that happens in the forward, so that nothing of size V stays
for the backward but the gradient of the weights themselves. The idea of a gradient taken in the forward is that of
Liger (arXiv 2410.10989, section 3.2); what it costs is that the weights of the terms must be known there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..errors import InputError
from .divergences import Divergence, log_probs
from .head import Head
from .reduction import Objective, TokenLoss, valid_rows
from .targets import Buckets, Compared, Target, compared

CHUNK = 256  # tokens whose logits are there at once
CACHED = 2**16  # logits worked on at once within a chunk on a CPU, so that a dozen passes over them stay in its cache
PART = 8192  # entries of a 16-bit head that are widened at once
AT_ONCE = 2**24  # the same elsewhere: few launches, bounded memory
WIDE_PRODUCTS = Version(torch.__version__) >= Version("2.8")  # torch.mm has an out_dtype, on CUDA


def chunked_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    mask: Tensor,
    labels: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> TokenLoss:
    """What :func:`.reduction.dense_loss` gives for the heads' logits; masked tokens cost nothing.

    Gradients reach `student_hidden` and the student's weight and bias, those of them that require one; the loss has no second
    derivative, and one backward. Logits, everything computed from them and all sums are float32 (float64 where the hidden
    states are), also where hidden states and weights are not; on a GPU autocast's precision rounds the factors of products.

    Args:
        objective: the terms and their weights.
        student_hidden, teacher_hidden: [..., H_S], [..., H_T], of the same tokens; the teacher's may be None where the
            divergence has no weight.
        student_head, teacher_head: V and H may differ; see :class:`.divergences.Divergence` for V.
        mask: [...] bool.
        labels: [...] int64, looked at where mask holds.
        chunk_size: tokens whose logits are held at once: memory against speed, the same result.
    """
    rows, chosen = valid_rows(objective, student_hidden, teacher_hidden, mask, labels, len(student_head.weight))
    target = None
    if objective.kd_weight and teacher_hidden is not None:
        if teacher_head is None:
            raise ValueError("expected the teacher's head for the divergence, got None")
        shared = min(len(student_head.weight), len(teacher_head.weight))
        target = _Live(teacher_hidden.detach().flatten(0, -2), rows, teacher_head, shared, wide(student_hidden))
    return _summed(objective, student_hidden, student_head, rows, target, chosen, chunk_size)


def bucket_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: Head,
    buckets: Buckets,
    mask: Tensor,
    labels: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> TokenLoss:
    """What :func:`.targets.dense_bucket_loss` gives for the head's logits; everything else as in :func:`chunked_loss`."""
    buckets.asked.check(objective.divergence, len(student_head.weight))
    rows, chosen = valid_rows(objective, student_hidden, buckets.log_probs, mask, labels, len(student_head.weight))
    target = buckets.chosen(rows, wide(student_hidden)) if objective.kd_weight else None
    return _summed(objective, student_hidden, student_head, rows, target, chosen, chunk_size)


def _summed(
    objective: Objective, hidden: Tensor, head: Head, rows: Tensor, target: Target | None, labels: Tensor | None, size: int
) -> TokenLoss:  # fmt: skip
    if size < 1:
        raise InputError(f"expected chunk_size >= 1, got {size}; fix --method.chunk_size")
    work = _Work(objective, head.softcap, target, labels, size, torch.is_grad_enabled())
    total, kd, ce = _Loss.apply(hidden.flatten(0, -2).index_select(0, rows), head.weight, head.bias, work)
    return TokenLoss(total, kd, ce, len(rows))


@torch.no_grad()
def chunked_logits(hidden: Tensor, head: Head, entries: int, chunk_size: int = CHUNK) -> Iterator[Tensor]:
    """The first logits [c, entries] of hidden states [N, H], a chunk after the other, in the losses' own precision."""
    layer = Layer(head, entries, wide(hidden))
    for part in hidden.split(chunk_size):
        z = hidden.new_empty(len(part), entries, dtype=wide(hidden))
        layer.write(part, z)
        yield z


def wide(hidden: Tensor) -> torch.dtype:
    """The precision of logits, and of all sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Work:
    """All that the loss of N tokens needs beside the student's tensors."""

    objective: Objective
    softcap: float | None
    target: Target | None
    labels: Tensor | None
    chunk_size: int
    differentiates: bool


class _Live(Target):
    """Hidden states of all tokens [M, H], numbers of the N valid ones, and the head; `entries` is how many both heads have."""

    def __init__(self, hidden: Tensor, rows: Tensor, head: Head, entries: int, wide: torch.dtype) -> None:
        self.hidden, self.rows, self.shared = hidden, rows, entries
        self.layer, self.start, self.z = Layer(head, entries, wide), 0, hidden.new_empty(0, entries, dtype=wide)

    @property
    def entries(self) -> int:
        return self.shared

    def read(self, part: slice) -> None:
        hidden, self.start = self.hidden.index_select(0, self.rows[part]), part.start
        if len(self.z) < len(hidden):  # the first part is the longest
            self.z = self.z.new_empty(len(hidden), self.shared)
        self.layer.write(hidden, self.z[: len(hidden)])

    def compare(self, divergence: Divergence, z: Tensor, at: slice, differentiates: bool) -> Compared:
        log_q, log_p = divergence.log_probs(z, self.z[at.start - self.start : at.stop - self.start])
        return Compared(log_q, *compared(divergence, log_q, log_p, differentiates))


class _Loss(torch.autograd.Function):
    """(h [N, H], W, b) -> the objective's sum, and those of its parts without a graph."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [needed and work.differentiates for needed in ctx.needs_input_grad[:3]]
        pass_ = _Pass(h, weight, bias, work, wanted)
        with torch.autocast(h.device.type, enabled=False):
            kd, ce = pass_.run().sum(1)
        ctx.gradients = pass_.gradients()
        ctx.mark_non_differentiable(kd, ce)
        return work.objective.kd_weight * kd + work.objective.ce_weight * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a backward without create_graph, got one with it: the chunked loss has no second derivative; use "
                "dense_loss"
            )
        if ctx.gradients is None:
            raise RuntimeError("expected one backward, got a second; call chunked_loss again")
        found, ctx.gradients = ctx.gradients, None  # scaled in place, and so once: one is as large as the weights
        return (*(None if g is None else g.mul_(upstream[0].to(g.dtype)) for g in found), None)


class Layer:
    """The first entries of a head: logits = c tanh((h W^T + b) / c), and their derivatives' products with a gradient."""

    def __init__(self, head: Head, entries: int, wide: torch.dtype) -> None:
        weight = head.weight.detach()[:entries]
        self.low, self.wide, self.softcap = _low_precision(weight, wide), wide, head.softcap
        self.weight = weight if self.low is None else weight.to(self.low)
        self.bias = None if head.bias is None else head.bias.detach()[:entries]
        whole = self.low is not None or weight.dtype == wide  # otherwise widened a part at a time
        size = max(1, entries if whole else PART)
        self.parts = [slice(start, min(start + size, entries)) for start in range(0, entries, size)]

    def write(self, hidden: Tensor, z: Tensor) -> None:
        """Logits of [c, H] into z [c, entries]."""
        hidden = hidden if self.low is None else hidden.to(self.low)
        for part in self.parts:
            _add_product(z[:, part], hidden, self.weight[part].t(), keep=False)
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)

    def to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """Adds a gradient [c, entries] times W to `out` [c, H]."""
        gradient = self._narrowed(gradient)
        for part in self.parts:
            _add_product(out, gradient[:, part], self.weight[part])

    def to_weight(self, gradient: Tensor, hidden: Tensor, out: Tensor) -> None:
        """Adds a gradient [c, entries], transposed, times [c, H] to `out` [entries, H]."""
        gradient = self._narrowed(gradient)
        _add_product(out, gradient.t(), hidden.to(gradient.dtype))

    def _narrowed(self, gradient: Tensor) -> Tensor:
        """In the precision of products, but not in float16: no loss scale has been applied yet that it would need."""
        return gradient if self.low is None or self.low == torch.float16 else gradient.to(self.low)


class _Pass:
    """One pass over the chunks; `wanted` says of h, W and b whether a gradient is."""

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, wanted: list[bool]) -> None:
        self.h, self.work, self.wanted, self.inputs = h, work, wanted, (h, weight, bias)
        self.wide = wide(h)
        self.shared = 0 if work.target is None else work.target.entries
        self.used = self.shared if work.labels is None else len(weight)  # entries of the student that are looked at
        head = Head(weight, bias, work.softcap)
        self.student = Layer(head, self.used, self.wide)
        self.sums = [
            torch.zeros(x.shape, dtype=self.wide, device=x.device) if x is not None and asked else None
            for x, asked in zip(self.inputs, wanted, strict=True)
        ]

    def run(self) -> Tensor:
        """Values of divergence and cross-entropy, [2, N]."""
        count, size, target = len(self.h), self.work.chunk_size, self.work.target
        values = self.h.new_zeros(2, count, dtype=self.wide)
        z = self.h.new_empty(min(size, count), self.used, dtype=self.wide)
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            n = rows.stop - start
            self.student.write(self.h[rows], z[:n])
            if target is not None:
                target.read(rows)
            for tile in _tiles(n, self.used, z.device.type):
                at = slice(start + tile.start, start + tile.stop)
                self._tile(z[tile], at, values[:, at])
            self._accumulate(z[:n], rows)
        return values

    def _tile(self, z: Tensor, at: slice, values: Tensor) -> None:
        """Writes the values [2, n] of tokens `at`, and in the place of their logits z [n, used] the objective's gradient."""
        objective, d, differentiates = self.work.objective, self.work.objective.divergence, any(self.wanted)
        slope = None if self.work.softcap is None else 1.0 - (z / self.work.softcap).square_()  # of c tanh(z / c)
        log_q = gradient = None
        if self.work.target is not None:
            log_q, values[0], gradient = self.work.target.compare(d, z[:, : self.shared], at, differentiates)
        if self.work.labels is not None:
            label = self.work.labels[at, None]
            if log_q is None or d.temperature != 1.0 or self.used != self.shared:
                log_q = log_probs(z)
            values[1] = -log_q.gather(1, label).squeeze(1)
            torch.mul(log_q.exp_(), objective.ce_weight, out=z)  # CE: q - 1 at the label
            z.scatter_add_(1, label, torch.full_like(label, -objective.ce_weight, dtype=z.dtype))
            if gradient is not None:
                z[:, : self.shared].add_(gradient, alpha=objective.kd_weight)
        elif gradient is not None:
            torch.mul(gradient, objective.kd_weight, out=z)
        if slope is not None:
            z.mul_(slope)

    def _accumulate(self, gradient: Tensor, rows: slice) -> None:
        """Adds what a chunk's gradient [c, used] gives for h, W and b."""
        to_h, to_weight, to_bias = self.sums
        if to_h is not None:
            self.student.to_hidden(gradient, to_h[rows])
        if to_weight is not None:
            self.student.to_weight(gradient, self.h[rows], to_weight[: self.used])
        if to_bias is not None:
            to_bias[: self.used].add_(gradient.sum(0))

    def gradients(self) -> list[Tensor | None]:
        """Of h, W and b, in their own dtypes; None where not wanted."""
        return [s if s is None or x is None else s.to(x.dtype) for s, x in zip(self.sums, self.inputs, strict=True)]


def _low_precision(weight: Tensor, wide: torch.dtype) -> torch.dtype | None:
    """The 16 bits that factors of products are to have; None for what they are, widened. CPUs gain nothing by rounding."""
    kind = weight.device.type
    if kind == "cpu" or wide == torch.float64:
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return None if dtype == wide else dtype


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: bool = True) -> None:
    """out = keep out + a b, with `out`'s precision in all sums, whatever that of the factors.

    A product rounded to 16 bits before it is added to others would lose what is small in each of many chunks.
    """
    if a.dtype == b.dtype != out.dtype and out.is_cuda and WIDE_PRODUCTS:
        product = torch.mm(a, b, out_dtype=out.dtype)
        out.copy_(out + product if keep else product)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=float(keep))


def _tiles(rows: int, entries: int, device: str) -> Iterator[slice]:
    """Rows that are worked on together."""
    size = max(1, (CACHED if device == "cpu" else AT_ONCE) // max(1, entries))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
