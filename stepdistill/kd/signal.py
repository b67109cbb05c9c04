"""Where a teacher's next-token distributions come from: a model that computes them, or a cache of what it once computed.

Methods that learn on given text take a :class:`Signal` and can't tell which of them it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..batch import Batch
from ..data.tokens import Tokens
from .chunked import CHUNK, bucket_loss, chunked_loss
from .networks import CausalLM, sizes, told_sizes
from .reduction import Objective, TokenLoss, dense_loss, next_token
from .targets import Asked, Buckets, dense_bucket_loss

IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"  # in Batch.extra


class Signal(ABC):
    """A teacher, on the tokens of a batch."""

    @abstractmethod
    def check(self, objective: Objective, student: CausalLM) -> str:
        """What there is to say before training, "" for nothing. InputError for what this teacher can't teach."""

    @abstractmethod
    def loss(self, objective: Objective, student: CausalLM, batch: Batch, chunk_size: int = CHUNK) -> TokenLoss:
        """The objective summed over the targets of `batch`, with a graph for the student alone."""


class LiveTeacher(Signal):
    """A model that reads the batch beside the student.

    Args:
        teacher: frozen; a table of logits padded to another size is compared on the entries that both have.
    """

    def __init__(self, teacher: CausalLM) -> None:
        self.teacher = teacher

    def check(self, objective: Objective, student: CausalLM) -> str:
        return told_sizes(**sizes({"student": student, "teacher": self.teacher}))

    def loss(self, objective: Objective, student: CausalLM, batch: Batch, chunk_size: int = CHUNK) -> TokenLoss:
        return token_loss(objective, student, self.teacher, Tokens.of(batch), chunk_size)


class CachedTeacher(Signal):
    """What a model said of the same text, from the batches of :class:`.teacher_cache.CachedRows`.

    Args:
        asked: what it was asked.
        parameters: of the model.
        hashes: what a resumed run knows it again by; for `Trainer.teacher`.
    """

    def __init__(self, asked: Asked, parameters: int, hashes: Mapping[str, str]) -> None:
        self.asked, self.parameters, self.hashes = asked, parameters, dict(hashes)

    def check(self, objective: Objective, student: CausalLM) -> str:
        self.asked.check(objective.divergence, student.vocabulary)
        return told_sizes(sizes({"student": student})["student"], self.parameters)

    def loss(self, objective: Objective, student: CausalLM, batch: Batch, chunk_size: int = CHUNK) -> TokenLoss:
        if LOG_PROBS not in batch.extra:
            raise ValueError(
                f"a cached teacher needs its answers (Batch.extra[{LOG_PROBS!r}]), got a data set without; use CachedRows"
            )
        ours, labels, mask = outputs(student, Tokens.of(batch), student.is_factored)
        given = (batch.extra[name][:, :-1] for name in (IDS, LOG_PROBS))  # beside the rows that next_token keeps
        buckets = Buckets(self.asked, *given)
        if not student.is_factored:
            return dense_bucket_loss(objective, ours, buckets, mask, labels)
        return bucket_loss(objective, ours, student.head, buckets, mask, labels, chunk_size)


def signal_of(teacher: CausalLM | Signal) -> Signal:
    """The signal of a model, a signal itself."""
    return teacher if isinstance(teacher, Signal) else LiveTeacher(teacher)


def token_loss(
    objective: Objective, student: CausalLM, teacher: CausalLM | None, tokens: Tokens, chunk_size: int = CHUNK
) -> TokenLoss:
    """The objective summed over the targets of `tokens`; the teacher has no graph, and may be None where it has no weight."""
    factored = student.is_factored and (teacher is None or teacher.is_factored)
    theirs = None
    if teacher is not None:
        with torch.no_grad():
            theirs, _, _ = outputs(teacher, tokens, factored)
    ours, labels, mask = outputs(student, tokens, factored)
    if not factored:
        return dense_loss(objective, ours, theirs, mask, labels)
    head = None if teacher is None else teacher.head
    return chunked_loss(objective, ours, student.head, theirs, head, mask, labels, chunk_size)


def outputs(lm: CausalLM, tokens: Tokens, factored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states or logits [B, S - 1, ...], the tokens that they predict, whether those are targets)."""
    given = tokens.input_ids, tokens.attention_mask
    found = lm.hidden(*given) if factored else lm(*given)
    return next_token(found, tokens.input_ids, tokens.loss_mask, tokens.attention_mask)
