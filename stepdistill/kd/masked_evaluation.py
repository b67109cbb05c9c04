"""How good a masked language model is: perplexity and accuracy at masked words of held-out text, and what it guesses.

The masks are a function of the rows alone, so that all models guess the same words, whatever the batch. The perplexity is that
of masked words given the others; it says nothing of a text's probability and can't be compared with a causal model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.masked import Alphabet, MaskedRows, MaskedTokens, MaskingConfig, framed_blocks
from ..data.text import Example
from ..errors import InputError
from ..randomness import StepRandom
from .divergences import log_probs
from .evaluation import BATCH
from .masked import MaskedLM, are_factored

WORDS = 8  # of a sample


@dataclass
class MaskedEvalConfig:
    """What is measured at the end.

    Attributes:
        max_tokens: of the held-out text.
        masks: how often it is read, each time with other words masked.
        samples: held-out beginnings with a word to be guessed, where --train.validation_prompts names none.
    """

    max_tokens: int = 20_000
    masks: int = 4
    samples: int = 3

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 3), ("masks", 1), ("samples", 0)):
            if (value := vars(self)[name]) < least:
                raise InputError(f"expected {name} >= {least}, got {value}; fix --eval.{name}")


@dataclass(frozen=True)
class Score:
    """At masked words.

    Attributes:
        loss: mean cross-entropy, nats.
        accuracy: share of words guessed first.
        count: how many words there were.
    """

    loss: float
    accuracy: float
    count: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))  # beyond it a float is infinite


def score(lm: MaskedLM, looks: Sequence[MaskedRows]) -> Score:
    """Over all rows of all `looks`."""
    loss, right, count = 0.0, 0, 0
    device = next(lm.module.parameters()).device
    with lm.evaluating():
        for rows in looks:
            for start in range(0, len(rows), BATCH):
                indices = range(start, min(start + BATCH, len(rows)))
                tokens = MaskedTokens.of(rows.batch(indices, StepRandom(0, 0, indices)).to(device))
                logits = logits_at(lm, tokens.input_ids, tokens.attention_mask, tokens.loss_mask)
                wanted = tokens.labels[tokens.loss_mask]
                log_q = log_probs(logits)
                loss -= float(log_q.gather(1, wanted[:, None]).cpu().double().sum())  # MPS has no float64
                right += int((log_q.argmax(1) == wanted).sum())
                count += len(wanted)
    return Score(loss / max(1, count), right / max(1, count), count)


def logits_at(lm: MaskedLM, input_ids: Tensor, attention_mask: Tensor, places: Tensor) -> Tensor:
    """[N, V] at the N places where `places` [B, S] holds; the logits elsewhere are not computed where they need not be."""
    if not are_factored(lm):
        return lm(input_ids, attention_mask)[places]
    return lm.head.logits(lm.hidden(input_ids, attention_mask)[places])


class MaskedExamination:
    """Held-out text, read by several models in the same way.

    Args:
        examples: documents.
        tokenizer: of all models.
        window: tokens of a block.
        config: how much.
        masking: how words are masked.
        prompts: texts with the tokenizer's mask token in them, to be guessed; by default held-out ones.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Any, window: int, config: MaskedEvalConfig, masking: MaskingConfig,
        prompts: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        rows = framed_blocks(examples, tokenizer, window, rest=True)[: max(1, config.max_tokens // window)]
        alphabet = Alphabet.of(tokenizer)
        self.looks = [MaskedRows(rows, alphabet, masking, fixed=number) for number in range(config.masks)]
        self.tokenizer, self.window, self.tokens = tokenizer, window, sum(len(row.ids) for row in rows)
        self.prompts = list(prompts or (_hidden(e.text, tokenizer.mask_token) for e in examples[: config.samples]))
        for prompt in self.prompts:
            if tokenizer.mask_token not in prompt:
                raise InputError(
                    f"expected {tokenizer.mask_token} where a word is to be guessed, got {prompt!r}; fix "
                    "--train.validation_prompts"
                )

    def scores(self, models: Mapping[str, MaskedLM]) -> dict[str, Score]:
        """Of each model."""
        return {name: score(lm, self.looks) for name, lm in models.items()}

    def guesses(self, lm: MaskedLM) -> list[str]:
        """The likeliest token at each mask of each prompt."""
        device, found = next(lm.module.parameters()).device, []
        for prompt in self.prompts:
            ids = torch.tensor(self.tokenizer(prompt, truncation=True, max_length=self.window)["input_ids"])[None].to(
                device
            )
            places = ids == self.tokenizer.mask_token_id
            with lm.evaluating():
                best = logits_at(lm, ids, torch.ones_like(ids, dtype=torch.bool), places).argmax(1)
            found.append(" ".join(self.tokenizer.decode([token]).strip() for token in best.tolist()))
        return found


def _hidden(text: str, mask: str) -> str:
    """The first words of a text with one in the middle to be guessed."""
    words = text.split()[:WORDS]
    middle = len(words) // 2
    return " ".join([*words[:middle], mask, *words[middle + 1 :]])
