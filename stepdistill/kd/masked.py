"""Masked language models (BERT, arXiv 1810.04805) as networks, and plain training of one: the control group of distillation.

Such a head is a small network, the transform, and then a linear layer over the vocabulary. What the loss goes through in chunks
is that last layer alone, and what it reads is what the transform gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..batch import Batch
from ..data.masked import MaskedTokens
from ..method import Losses, Method
from ..networks.network import Network
from .chunked import CHUNK, chunked_loss
from .head import NotCalled
from .networks import LanguageModel
from .reduction import Objective, TokenLoss, dense_loss


@dataclass(frozen=True)
class Reading:
    """What a masked language model makes of tokens [B, S], in one forward.

    Attributes:
        last: the hidden states after the last layer, [B, S, H].
        outputs: what the head's last layer reads, [B, S, H'], or the logits, [B, S, V].
    """

    last: Tensor
    outputs: Tensor


class MaskedLM(LanguageModel):
    """A masked language model of Transformers in a BERT layout. Padding stands on the right; all tokens are of segment 0.

    Args:
        net: such as BertForMaskedLM, RobertaForMaskedLM or DistilBertForMaskedLM.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.explained = bool(self.body) and self._head_explains_logits()

    @property
    def window(self) -> int | None:
        return positions_of(self.module)

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Entries of a hidden state."""
        return int(self.config.hidden_size)

    def layers_only(self) -> Self:
        """The same weights, of which embeddings and layers train; what the head alone has is frozen, also in this network."""
        layers = {id(parameter) for parameter in self.module.get_submodule(self.body).parameters()}
        for parameter in self.module.parameters():
            parameter.requires_grad_(id(parameter) in layers)
        twin = copy.copy(self)
        twin._fix_trainable()
        return twin

    def _run(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Any:
        with self.active():
            return self.net(input_ids=input_ids, attention_mask=attention_mask.long(), **more)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self._run(input_ids, attention_mask).logits
        return logits

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head's last layer reads, [B, S, H'], after the transform. Where :attr:`is_factored`."""
        with self._before_logits() as kept:
            self._run(input_ids, attention_mask)
        if not kept:
            raise NotCalled(f"expected logits of {type(self.output_layer).__name__}, got them without a call of it")
        return kept[0]

    def read(self, input_ids: Tensor, attention_mask: Tensor, factored: bool) -> Reading:
        """Last hidden states and what the head's last layer reads (`factored`), or its logits, in one forward."""
        with self.taps((self.body,)) as states:
            outputs = (self.hidden if factored else self)(input_ids, attention_mask)
        return Reading(states[self.body], outputs)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """[B, S, H] each: after the embeddings, then after each layer."""
        with self._before_logits() if self.is_factored else self.active():
            states: tuple[Tensor, ...] = self._run(input_ids, attention_mask, output_hidden_states=True).hidden_states
        return states

    @contextmanager
    def _before_logits(self) -> Iterator[list[Tensor]]:
        """Within it the output layer's input is kept, and the layer gets the first place of it alone.

        The forward still goes through net, so that DDP knows of it, and its logits cost next to nothing.
        """
        kept: list[Tensor] = []

        def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            kept.append(inputs[0])
            return (inputs[0][:, :1],)

        handle = self.output_layer.register_forward_pre_hook(keep)
        try:
            yield kept
        finally:
            handle.remove()


def positions_of(model: Any) -> int | None:
    """The most tokens that an encoder of Transformers has positions for; RoBERTa's begin after its padding's id."""
    found = model.config.to_dict().get("max_position_embeddings")
    table = dict(model.base_model.named_modules()).get("embeddings.position_embeddings")
    first = table.padding_idx + 1 if isinstance(table, nn.Embedding) and table.padding_idx is not None else 0
    return None if found is None else int(found) - first


def are_factored(student: MaskedLM, teacher: MaskedLM | None = None) -> bool:
    """Whether a loss of theirs may go through the vocabulary in chunks."""
    return student.is_factored and (teacher is None or teacher.is_factored)


def output_loss(
    objective: Objective, student: MaskedLM, ours: Tensor, teacher: MaskedLM | None, theirs: Tensor | None, mask: Tensor,
    labels: Tensor | None = None, chunk_size: int = CHUNK,
) -> TokenLoss:  # fmt: skip
    """The objective summed over the tokens of `mask` [B, S], of outputs read as :func:`are_factored` says."""
    if not are_factored(student, teacher):
        return dense_loss(objective, ours, theirs, mask, labels)
    head = None if teacher is None else teacher.head
    return chunked_loss(objective, ours, student.head, theirs, head, mask, labels, chunk_size)


class MaskedToken(Method):
    """Plain masked language modelling (arXiv 1810.04805, section 3.1): of a teacher before, and of control groups.

    Args:
        student: in train mode.
    """

    def __init__(self, student: MaskedLM) -> None:
        self.student = student

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        tokens = MaskedTokens.of(batch)
        ours = self.student.read(tokens.input_ids, tokens.attention_mask, are_factored(self.student)).outputs
        plain = Objective(kd_weight=0.0, ce_weight=1.0)
        found = output_loss(plain, self.student, ours, None, None, tokens.loss_mask, tokens.labels)
        return Losses({"cross_entropy": found.mean}, count=float(found.count))
