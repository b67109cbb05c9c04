"""Tokens to be guessed (BERT, arXiv 1810.04805, section 3.1): which are masked, what stands in their place, what counts.

Masks are dynamic (RoBERTa, arXiv 1907.11692, section 4.1): a function of (seed, step, position in the global batch), made anew
each time a row is seen. Padding is known by lengths, targets by the mask that was drawn; neither is read off a token's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..randomness import StepRandom, derived_seed
from .text import Example
from .tokens import Row, padded, stream


@dataclass
class MaskingConfig:
    """How tokens are masked.

    Attributes:
        share: of a row's ordinary tokens, how many are to be guessed; one at least.
        hidden: share of those that the mask token replaces.
        swapped: share of those that another token, any ordinary one, replaces; the rest stay as they are.
    """

    share: float = 0.15
    hidden: float = 0.8
    swapped: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"expected a share in (0, 1], got {self.share}; fix --masking.share")
        for name in ("hidden", "swapped"):
            if not 0.0 <= (value := vars(self)[name]) <= 1.0:
                raise InputError(f"expected a share in [0, 1], got {value}; fix --masking.{name}")
        if self.hidden + self.swapped > 1.0 + 1e-9:
            raise InputError(
                f"expected hidden + swapped <= 1, got {self.hidden:g} + {self.swapped:g}; fix --masking.hidden"
            )


@dataclass(frozen=True)
class MaskedTokens:
    """The token part of a batch, [B, S] each, kept in `Batch.extra` under these names.

    Attributes:
        input_ids: int64, some of them masked.
        attention_mask: True where there is a token, False at the padding on the right.
        loss_mask: True where the token is to be guessed.
        labels: int64, the tokens as they were, everywhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Batch) -> MaskedTokens:
        """Those of a batch; ValueError where it has none."""
        names = ("input_ids", "attention_mask", "loss_mask", "labels")
        if missing := [name for name in names if name not in batch.extra]:
            raise ValueError(f"this method needs masked tokens, got a batch without {missing}; use data/masked.py")
        return cls(*(batch.extra[name] for name in names))


@dataclass(frozen=True)
class Alphabet:
    """What the ids of a tokenizer are.

    Attributes:
        begin: the token before a row ([CLS]).
        end: the token after a document and after a row ([SEP]).
        pad: of the padding.
        mask: what stands for a token to be guessed.
        ordinary: [n] int64, all ids that are no special token, in order.
    """

    begin: int
    end: int
    pad: int
    mask: int
    ordinary: Tensor

    @classmethod
    def of(cls, tokenizer: Any) -> Alphabet:
        """A tokenizer's; InputError where it lacks one of the special tokens."""
        wanted = {
            "cls_token": tokenizer.cls_token_id, "sep_token": tokenizer.sep_token_id,
            "pad_token": tokenizer.pad_token_id, "mask_token": tokenizer.mask_token_id,
        }  # fmt: skip
        if missing := [name for name, number in wanted.items() if number is None]:
            raise InputError(
                f"expected a tokenizer of a masked language model, got one without {', '.join(missing)}; give the path of a "
                "BERT-like checkpoint (--teacher.path)"
            )
        special = set(tokenizer.all_special_ids)
        ordinary = sorted(number for number in tokenizer.get_vocab().values() if number not in special)
        if not ordinary:
            raise InputError("expected a tokenizer with words in it, got special tokens alone; fix --teacher.path")
        begin, end, pad, mask = (int(number) for number in wanted.values())
        return cls(begin, end, pad, mask, torch.tensor(ordinary))


class MaskedRows:
    """A data set of rows some of whose tokens are masked, padded on the right to the longest of a batch.

    Args:
        rows: one or more; what may be masked in each is what is learned in it.
        alphabet: of the tokenizer.
        config: how.
        fixed: masks are a function of the row and of this number (a second look at the same rows has others); None draws
            them anew at each step.
    """

    def __init__(
        self, rows: Sequence[Row], alphabet: Alphabet, config: MaskingConfig | None = None, fixed: int | None = None
    ) -> None:
        if not rows:
            raise InputError("expected a sequence of tokens or more, got none; give more text (--data.path)")
        self.rows, self.alphabet, self.config, self.fixed = list(rows), alphabet, config or MaskingConfig(), fixed

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def share(self) -> float:
        """Of all tokens that are no padding, how many are to be guessed: a number of the rows', not of the draws."""
        return sum(self.quota(row) for row in self.rows) / sum(len(row.ids) for row in self.rows)

    def quota(self, row: Row) -> int:
        """How many tokens of a row are to be guessed: one at least, where there is one."""
        ordinary = sum(row.learned)
        return min(ordinary, max(1, int(self.config.share * ordinary + 0.5)))

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """Rows `indices`."""
        rows = [self.rows[i] for i in indices]
        labels, real = (
            padded([r.ids for r in rows], self.alphabet.pad),
            padded([[True] * len(r.ids) for r in rows], False),
        )
        draws = rng if self.fixed is None else StepRandom(self.fixed, 0, [derived_seed("row", *r.ids) for r in rows])
        chosen = self._chosen(rows, labels.shape[1], draws)
        extra = {
            "input_ids": self._masked(labels, chosen, draws), "attention_mask": real, "loss_mask": chosen, "labels": labels,
        }  # fmt: skip
        return Batch(None, {}, {}, rng, extra)

    def _chosen(self, rows: Sequence[Row], size: int, rng: StepRandom) -> Tensor:
        """[B, size] bool: of each row's ordinary tokens those with the smallest of as many uniform numbers."""
        order = rng.uniform("order", (size,))  # a longer batch draws more of them, the first ones are the same
        order = order.masked_fill(~padded([row.learned for row in rows], False), 2.0)
        rank = order.argsort(1).argsort(1)
        return rank < torch.tensor([self.quota(row) for row in rows])[:, None]

    def _masked(self, labels: Tensor, chosen: Tensor, rng: StepRandom) -> Tensor:
        """The tokens with 80 % of the chosen hidden, 10 % swapped and 10 % as they were (section 3.1 and appendix A.1)."""
        u, ordinary = rng.uniform("what", labels.shape[1:]), self.alphabet.ordinary
        other = ordinary[(rng.uniform("other", labels.shape[1:]) * len(ordinary)).long()]
        hidden = chosen & (u < self.config.hidden)
        swapped = chosen & ~hidden & (u < self.config.hidden + self.config.swapped)
        return torch.where(hidden, self.alphabet.mask, torch.where(swapped, other, labels))


def framed_blocks(examples: Sequence[Example], tokenizer: Any, size: int, rest: bool = False) -> list[Row]:
    """Documents packed end to end into blocks of `size` tokens: [CLS], words with [SEP] between documents, [SEP].

    Only words may be masked, no special token.

    Args:
        rest: whether what fills no block is a shorter row of its own; it is left out otherwise.
    """
    if size < 3:
        raise InputError(f"expected blocks of 3 tokens or more, got {size}; fix --data.block_size")
    if not all(example.is_document for example in examples):
        raise InputError("expected documents for masked tokens, got prompts or conversations; give text (--data.path)")
    alphabet = Alphabet.of(tokenizer)
    ids, special = stream(examples, tokenizer, alphabet.end).tolist(), set(tokenizer.all_special_ids)
    rows = []
    for start in range(0, len(ids), size - 2):
        words = ids[start : start + size - 2]
        if len(words) == size - 2 or rest:
            row = (alphabet.begin, *words, alphabet.end)
            rows.append(Row(row, tuple(token not in special for token in row)))
    rows = [row for row in rows if any(row.learned)]
    if not rows:
        raise InputError(
            f"expected text for a block of {size} tokens or more, got {len(ids)} tokens; give more, or lower --data.block_size"
        )
    return rows
