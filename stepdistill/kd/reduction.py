"""From values per token to a loss: which tokens count, how they are summed, and which logit belongs to which token.

A sum over the vocabulary, then over valid tokens, and the number of those. A micro-batch's mean goes to the trainer with that
number as its count, and becomes the mean over all valid tokens of the global batch there; a mean of means would give tokens of
short sequences more weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ..method import Losses
from .divergences import Divergence, log_probs


@dataclass(frozen=True)
class Objective:
    """What is minimised per token: kd_weight T^2 D(p_T, q_T) + ce_weight CE(label, q), the cross-entropy at T = 1.

    Attributes:
        divergence: D, which brings its own T^2.
        kd_weight: of it.
        ce_weight: of the cross-entropy over all entries of the student; 0 needs no labels.
    """

    divergence: Divergence = field(default_factory=Divergence)
    kd_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.kd_weight, self.ce_weight)
        if not all(0.0 <= w < math.inf for w in weights) or sum(weights) == 0:
            raise InputError(
                f"expected weights of at least 0, one of them above, got {weights}; fix --method.kd_weight, --method.ce_weight"
            )


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the valid tokens of a micro-batch.

    Attributes:
        total: of the objective, a scalar with a graph; 0 with a graph where no token is valid.
        kd: of T^2 D, without a graph.
        ce: of the cross-entropy, without a graph; 0 where it has no weight.
        count: how many valid tokens there are.
    """

    total: Tensor
    kd: Tensor
    ce: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The objective's mean over the valid tokens, with a graph."""
        return self.total / max(1, self.count)

    def losses(self, name: str = "distillation") -> Losses:
        """What a method returns: the mean as the term `name`, the parts as metrics `kd` and `ce`, tokens as the count."""
        parts = {"kd": self.kd, "ce": self.ce}
        return Losses({name: self.mean}, {k: v / max(1, self.count) for k, v in parts.items()}, count=float(self.count))


def masked_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """(the sum of values [...] where mask [...] (bool) holds, how many those are); 0 with a graph for none of them.

    Values elsewhere may be NaN, what they were computed from may not: logits of masked tokens are to be dropped before they
    enter a softmax (:func:`dense_loss` does), since a gradient of 0 times a derivative of infinity is NaN.
    """
    chosen = values[mask]
    return chosen.sum(), len(chosen)


def dense_loss(
    objective: Objective,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    mask: Tensor,
    labels: Tensor | None = None,
) -> TokenLoss:
    """The objective of whole logits: student [..., V_S], teacher [..., V_T], mask [...] bool, labels [...] int64.

    Rows and labels belong together already (:func:`next_token` shifts them). The teacher may be None where the divergence has
    no weight. :func:`stepdistill.kd.chunked.chunked_loss` gives the same from hidden states, without the logits.
    """
    rows, chosen = valid_rows(objective, student_logits, teacher_logits, mask, labels, student_logits.shape[-1])
    z = student_logits.flatten(0, -2).index_select(
        0, rows
    )  # before any exp: what a masked token holds is never looked at
    kd = None
    if objective.kd_weight and teacher_logits is not None:
        kd = objective.divergence(z, teacher_logits.detach().flatten(0, -2).index_select(0, rows))
    return added(objective, z, kd, chosen)


def added(objective: Objective, z: Tensor, kd: Tensor | None, labels: Tensor | None) -> TokenLoss:
    """The objective of N valid tokens from logits [N, V], values of the divergence [N] and labels [N], if there are any."""
    total = kd_sum = ce = log_probs(z[:0]).sum()  # 0, with a graph
    if kd is not None:
        kd_sum = kd.sum()
        total = total + objective.kd_weight * kd_sum
    if labels is not None:
        ce = functional.nll_loss(log_probs(z), labels, reduction="sum")
        total = total + objective.ce_weight * ce
    return TokenLoss(total, kd_sum.detach(), ce.detach(), len(z))


def valid_rows(
    objective: Objective, student: Tensor, teacher: Tensor | None, mask: Tensor, labels: Tensor | None, entries: int
) -> tuple[Tensor, Tensor | None]:
    """(numbers of the valid tokens [N], their labels [N] or None without a cross-entropy).

    ValueError for shapes that do not belong together, for what the objective needs and is not there, and for valid tokens with
    labels outside of [0, entries).
    """
    shape = student.shape[:-1]
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"expected a bool mask {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if objective.kd_weight and (teacher is None or teacher.shape[:-1] != shape):
        found = "none" if teacher is None else list(teacher.shape[:-1])
        raise ValueError(f"expected a teacher's outputs {list(shape)} for the divergence, got {found}")
    rows = mask.flatten().nonzero().squeeze(1)
    if not objective.ce_weight:
        return rows, None
    if labels is None or labels.shape != shape:
        found = "none" if labels is None else list(labels.shape)
        raise ValueError(f"expected labels {list(shape)} for the cross-entropy, got {found}")
    chosen = labels.flatten().index_select(0, rows)
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < entries:
        raise ValueError(
            f"expected labels in [0, {entries}) where the mask holds, got {int(chosen.min())} to {int(chosen.max())}"
        )
    return rows, chosen


def length_mask(lengths: Tensor, size: int, starts: Tensor | None = None) -> Tensor:
    """True at places starts <= i < lengths of right-padded sequences; [B], [B] -> [B, size] bool.

    From lengths and never from token ids: where the padding token is the end token too, a mask by ids drops the true end, and
    the student never learns to stop.

    Args:
        lengths: tokens of each sequence, its end token among them.
        starts: where what is learned begins: the length of each prompt. 0 by default.
    """
    places = torch.arange(size, device=lengths.device)
    mask = places < lengths[:, None]
    return mask if starts is None else mask & (places >= starts[:, None])


def next_token(
    outputs: Tensor, tokens: Tensor, mask: Tensor, attention: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows beside the tokens they predict: (outputs[:, :-1], tokens[:, 1:], mask[:, 1:]).

    Args:
        outputs: logits or hidden states [B, S, ...]; row i comes from tokens up to i and predicts token i + 1.
        tokens: [B, S] int64.
        mask: [B, S] bool, True for tokens to be learned. It belongs to tokens, so it moves with them.
        attention: [B, S] bool, False at padding. Needed with padding on the left, where the row before the first token is none.
    """
    if outputs.shape[:2] != tokens.shape or tokens.shape != mask.shape:
        raise ValueError(
            f"expected outputs, tokens and mask [B, S], got {list(outputs.shape[:2])}, {list(tokens.shape)}, {list(mask.shape)}"
        )
    valid = mask[:, 1:] if attention is None else mask[:, 1:] & attention[:, :-1].bool()
    return outputs[:, :-1], tokens[:, 1:], valid
