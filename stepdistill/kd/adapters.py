"""Losses of several libraries behind one interface, for :mod:`.conformance`: ours, TRL's and Liger's.

An adapter calls what the library's own trainer calls and adds nothing to it. TRL and Liger are imported when theirs is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ..errors import InputError
from .chunked import CHUNK, Head, chunked_loss
from .divergences import Divergence
from .reduction import Objective, TokenLoss, dense_loss, length_mask, next_token

IGNORED = -100  # the label of tokens that do not count, in TRL and Liger


@dataclass(frozen=True)
class Case:
    """Inputs of a generalised JSD. Rows are beside the tokens they predict already.

    Attributes:
        student: hidden states [B, S, H]; where W is the identity they are logits.
        weight: of the student's head, [V, H].
        teacher, teacher_weight: the same of the teacher; widths and entries may differ.
        mask: [B, S] bool.
        beta, temperature: of the divergence.
        items: valid tokens of the global batch, of which this may be a part; None where it is all of it.
        chunk_size: tokens at once; None for the usual number.
    """

    student: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    mask: Tensor
    beta: float = 0.5
    temperature: float = 1.0
    items: int | None = None
    chunk_size: int | None = None

    @property
    def labels(self) -> Tensor:
        """[B, S]: some token where the mask holds, IGNORED elsewhere."""
        return torch.where(self.mask, 1, IGNORED)


class Adapter(ABC):
    """One implementation of the loss.

    Attributes:
        name: of library and function.
        packages: whose versions are told.
        chunked: whether it takes a number of tokens at a time.
    """

    name: str
    packages: tuple[str, ...]
    chunked = True

    @abstractmethod
    def loss(self, case: Case) -> Tensor:
        """Sum over valid tokens / `case.items`, or over their number in the case where that is None; with a graph."""

    def sequence_loss(self, student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The same of whole sequences: logits [B, S, V], tokens [B, S], mask [B, S] of tokens to learn.

        NotImplementedError where the shift is left to the caller.
        """
        raise NotImplementedError

    def mask(self, tokens: Tensor, prompt: int, end: int) -> Tensor:
        """Which of tokens [B, S] are learned, of samples padded with their end token; `prompt` tokens come first.

        NotImplementedError where that is left to the caller.
        """
        raise NotImplementedError

    @property
    def versions(self) -> str:
        """Names and versions of the packages."""
        return ", ".join(f"{package} {version(package)}" for package in self.packages)


class OursDense(Adapter):
    """:func:`.reduction.dense_loss`, :func:`.reduction.next_token` and :func:`.reduction.length_mask`."""

    name, packages, chunked = "stepdistill, dense", ("stepdistill", "torch"), False

    def loss(self, case: Case) -> Tensor:
        return self._over(self._sums(case), case.items)

    def _sums(self, case: Case) -> TokenLoss:
        student, teacher = case.student @ case.weight.t(), case.teacher @ case.teacher_weight.t()
        return dense_loss(_objective(case), student, teacher, case.mask)

    def _over(self, sums: TokenLoss, items: int | None) -> Tensor:
        """What the trainer makes of a mean and its count."""
        losses = sums.losses()
        return losses.total if items is None else losses.total * losses.count / items

    def sequence_loss(self, student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        rows, _, valid = next_token(student, tokens, mask)
        return dense_loss(Objective(Divergence("jsd")), rows, teacher[:, :-1], valid).mean

    def mask(self, tokens: Tensor, prompt: int, end: int) -> Tensor:
        # a sampler knows when it stopped; here the first end token after the prompt says it
        ended = (tokens[:, prompt:] == end).int()
        lengths = prompt + torch.where(ended.any(1), ended.argmax(1) + 1, ended.shape[1])
        return length_mask(lengths, tokens.shape[1], torch.full_like(lengths, prompt))


class OursChunked(OursDense):
    """:func:`.chunked.chunked_loss`."""

    name, chunked = "stepdistill, chunked", True

    def _sums(self, case: Case) -> TokenLoss:
        heads = Head(case.weight), Head(case.teacher_weight)
        size = case.chunk_size or CHUNK
        return chunked_loss(
            _objective(case), case.student, heads[0], case.teacher, heads[1], case.mask, chunk_size=size
        )


def _objective(case: Case) -> Objective:
    return Objective(Divergence("jsd", case.beta, temperature=case.temperature))


class TRLDense(Adapter):
    """GKDTrainer: its loss, the shift in its compute_loss, the mask of its samples."""

    name, packages, chunked = "TRL, GKDTrainer", ("trl", "torch"), False

    def __init__(self) -> None:
        _need("trl")
        from trl.experimental.gkd import GKDTrainer

        self.trainer = GKDTrainer

    def loss(self, case: Case) -> Tensor:
        student, teacher = case.student @ case.weight.t(), case.teacher @ case.teacher_weight.t()
        found: Tensor = self.trainer.generalized_jsd_loss(
            student, teacher, case.labels, case.beta, case.temperature, num_items_in_batch=case.items
        )
        return found

    def sequence_loss(self, student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        teacher_model: Any = _Fixed(teacher)
        trainer = SimpleNamespace(
            teacher_model=teacher_model, beta=0.5, generalized_jsd_loss=self.trainer.generalized_jsd_loss
        )
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.where(mask, tokens, IGNORED),
        }
        found: Tensor = self.trainer.compute_loss(trainer, _Fixed(student), inputs)
        return found

    def mask(self, tokens: Tensor, prompt: int, end: int) -> Tensor:
        model = SimpleNamespace(generate=lambda **_: SimpleNamespace(sequences=tokens))
        inputs = {
            "prompts": tokens[:, :prompt],
            "prompt_attention_mask": torch.ones_like(tokens[:, :prompt]),
        }
        _, _, labels = self.trainer.generate_on_policy_outputs(model, inputs, SimpleNamespace(eos_token_id=end))
        learned: Tensor = labels != IGNORED
        return learned


class _Fixed(torch.nn.Module):
    """A model whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


class TRLChunked(Adapter):
    """The loss of DistillationTrainer, of hidden states."""

    name, packages = "TRL, DistillationTrainer", ("trl", "torch")

    def __init__(self) -> None:
        _need("trl")
        from trl.kernels import chunked_divergence
        from trl.trainer import distillation_trainer

        self.module, self.trainer = chunked_divergence, distillation_trainer

    def loss(self, case: Case) -> Tensor:
        size = case.chunk_size or self.module.TOKEN_CHUNK_SIZE
        found = self.trainer._chunked_divergence_loss
        heads = case.weight, case.teacher_weight
        with patch.object(self.module, "TOKEN_CHUNK_SIZE", size):
            loss: Tensor = found(
                case.student, case.teacher, *heads, case.mask, case.beta, case.items, temperature=case.temperature
            )[0]
        return loss


class LigerChunked(Adapter):
    """LigerFusedLinearJSDLoss, eager, without its hard loss. It takes no count of the global batch."""

    name, packages = "Liger, LigerFusedLinearJSDLoss", ("liger-kernel", "torch")

    def __init__(self) -> None:
        _need("liger-kernel")
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        self.make = LigerFusedLinearJSDLoss

    def loss(self, case: Case) -> Tensor:
        size = case.chunk_size or 1024
        loss = self.make(0.0, 1.0, case.beta, IGNORED, case.temperature, compiled=False, chunk_size=size)
        student, teacher, labels = (x.flatten(0, 1) for x in (case.student, case.teacher, case.labels))
        found: Tensor = loss(student, case.weight, teacher, case.teacher_weight, labels)
        return found


def _need(package: str) -> None:
    try:
        version(package)
    except PackageNotFoundError as error:
        raise InputError(
            f"expected {package} to compare with, got none; pip install 'stepdistill[peers]', or --against ours"
        ) from error


LIBRARIES: dict[str, tuple[type[Adapter], ...]] = {
    "ours": (OursDense, OursChunked),
    "trl": (TRLDense, TRLChunked),
    "liger": (LigerChunked,),
}
