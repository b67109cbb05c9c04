"""What a student's next-token distributions are compared with: the k likeliest tokens of a teacher, and the rest as one.

The k likeliest tokens and all others together make k + 1 buckets. Between two distributions over buckets every divergence here
is at most what it is over the whole vocabulary (all are f-divergences, which never grow where outcomes are merged), grows
with k, and is the same at k = V. A sum over the k tokens alone would be no divergence: it can be negative, and is not smallest
at q = p; renormalised it could not tell how much the rest weighs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .divergences import LOWEST, Divergence, log_probs
from .reduction import Objective, TokenLoss, added, valid_rows


class Compared(NamedTuple):
    """Of n tokens: log q_T [n, entries], T^2 D [n], and its gradient in the student's logits [n, entries] if asked for."""

    log_q: Tensor
    value: Tensor
    gradient: Tensor | None


class Target(ABC):
    """What N distributions of a student are compared with, some of them at a time."""

    @property
    @abstractmethod
    def entries(self) -> int:
        """Of the vocabulary; the student may have more, which are left alone."""

    @abstractmethod
    def read(self, part: slice) -> None:
        """Makes tokens `part` of the N ready; the first part is the longest."""

    @abstractmethod
    def compare(self, divergence: Divergence, z: Tensor, at: slice, differentiates: bool) -> Compared:
        """The student's logits z [n, entries] of tokens `at`, which lie within the part that was read."""


def compared(
    divergence: Divergence, log_q: Tensor, log_p: Tensor, differentiates: bool
) -> tuple[Tensor, Tensor | None]:
    """(T^2 D [n], its gradient [n, V] or None)."""
    if differentiates:
        return divergence.value_and_gradient(log_q, log_p)
    return divergence.temperature**2 * divergence.value(log_q, log_p), None


@dataclass(frozen=True)
class Asked:
    """What a teacher was asked, of which its buckets are the answers.

    Attributes:
        entries: of its vocabulary, how many were compared.
        k: tokens with a bucket of their own.
        temperature: of the distributions. They say nothing of another one: the rest's mass at T is a sum over its tokens.
    """

    entries: int
    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.entries:
            raise InputError(f"expected k in [1, {self.entries}], the entries of the teacher, got {self.k}; fix --k")

    def check(self, divergence: Divergence, entries: int) -> None:
        """InputError for a divergence at another temperature, and for a student with fewer entries."""
        if divergence.temperature != self.temperature:
            raise InputError(
                f"expected temperature {self.temperature:g}, which the teacher's log-probabilities were cached at, got "
                f"{divergence.temperature:g}: what the tokens outside of the {self.k} likeliest weigh at another one is not "
                "known from their mass; fix --method.divergence.temperature, or cache anew with --temperature"
            )
        if entries < self.entries:
            raise InputError(
                f"expected a student with the {self.entries} entries of the cached teacher or more, got {entries}: the mass of "
                f"entries that it lacks is not known; cache anew with --vocabulary {entries}"
            )


@dataclass(frozen=True)
class Buckets(Target):
    """A teacher's k likeliest tokens, and the mass of the rest.

    Attributes:
        asked: what of.
        ids: [..., k], integers in ascending order.
        log_probs: [..., k + 1] log-probabilities of those and of all others together; [..., k] where there are no others.
    """

    asked: Asked
    ids: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, asked: Asked, logits: Tensor) -> Buckets:
        """From a teacher's logits [..., V], of which the first are looked at; float32 at least, ids int64."""
        log_p = log_probs(logits.detach()[..., : asked.entries], asked.temperature)
        ids = log_p.topk(asked.k, -1).indices.sort(-1).values
        return cls(asked, ids, bucketed(log_p, ids))

    @property
    def entries(self) -> int:
        return self.asked.entries

    def chosen(self, rows: Tensor, wide: torch.dtype) -> Buckets:
        """Those of tokens `rows` [N] of all, counted through: ids [N, k], log-probabilities in `wide`."""
        ids, kept = (x.flatten(0, -2).index_select(0, rows) for x in (self.ids, self.log_probs))
        # 16 bits no longer sum to 1, and the divergence of anything else is not 0 at q = p
        log_p = log_probs(kept.to(wide)) if kept.dtype.itemsize == 2 else kept.to(wide).clamp(min=LOWEST)
        return Buckets(self.asked, ids, log_p)

    def read(self, part: slice) -> None:
        """Everything is here."""

    def compare(self, divergence: Divergence, z: Tensor, at: slice, differentiates: bool) -> Compared:
        log_q, ids = log_probs(z, divergence.temperature), self.ids[at].long()
        if (k := self.asked.k) == self.entries:
            value, gradient = compared(divergence, log_q.gather(1, ids), self.log_probs[at], differentiates)
            return Compared(log_q, value, None if gradient is None else torch.empty_like(z).scatter_(1, ids, gradient))
        kept = log_q.gather(1, ids)
        log_q.scatter_(1, ids, -math.inf)
        tail = log_q.logsumexp(
            1, keepdim=True
        )  # not log(1 - sum q): that difference has lost all digits of a small rest
        value, slope = compared(divergence, torch.cat([kept, tail], 1), self.log_probs[at], differentiates)
        gradient = None
        if slope is not None:
            # of a token in the rest: its share of the rest, times the gradient in the rest's logit
            gradient = (log_q - tail).exp_().mul_(slope[:, k:]).scatter_(1, ids, slope[:, :k])
        return Compared(log_q.scatter_(1, ids, kept), value, gradient)


def bucketed(log_q: Tensor, ids: Tensor) -> Tensor:
    """log q [..., V] -> that of tokens ids [..., k] and of all others together, [..., k + 1]; [..., k] where k = V."""
    kept = log_q.gather(-1, ids)
    if ids.shape[-1] == log_q.shape[-1]:
        return kept
    return torch.cat([kept, log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)


def dense_bucket_loss(
    objective: Objective, student_logits: Tensor, buckets: Buckets, mask: Tensor, labels: Tensor | None = None
) -> TokenLoss:
    """:func:`.reduction.dense_loss` between whole logits of the student [..., V] and a teacher's buckets [...]."""
    entries, d = student_logits.shape[-1], objective.divergence
    buckets.asked.check(d, entries)
    rows, chosen = valid_rows(objective, student_logits, buckets.log_probs, mask, labels, entries)
    z = student_logits.flatten(0, -2).index_select(0, rows)
    kd = None
    if objective.kd_weight:
        log_q = log_probs(z[:, : buckets.entries], d.temperature)
        theirs = buckets.chosen(rows, log_q.dtype)
        kd = d.temperature**2 * d.value(bucketed(log_q, theirs.ids.long()), theirs.log_probs)
    return added(objective, z, kd, chosen)
