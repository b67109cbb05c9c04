"""Prompts as CLIP's and T5's text encoders take them, the same for every family that has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batch import Cond


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Any:
    """`input_ids` and `attention_mask` [B, L], padded and cut to the tokenizer's own length, as the stock pipelines do it.

    Args:
        length: L, where it is another.
    """
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def clip(encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Any:
    """CLIP's output for B prompts with the states of all layers, which the families take theirs from."""
    return encoder(tokenize(tokenizer, prompts, length).input_ids.to(encoder.device), output_hidden_states=True)


def t5(encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """T5's last states [B, length, D] of B prompts; the padding is not masked, as the stock pipelines have it."""
    states: Tensor = encoder(tokenize(tokenizer, prompts, length).input_ids.to(encoder.device))[0]
    return states


def replaced(cond: Cond, empty: Cond) -> Cond:
    """`cond` with the text of one prompt, [1, ...] each, in the place of its own."""
    return {**cond, **{key: value.to(cond[key]).expand_as(cond[key]) for key, value in empty.items()}}


def facts(tokenizer: Any) -> tuple[Any, ...]:
    """What decides the tokens of a prompt."""
    return tokenizer.model_max_length, tokenizer.pad_token_id, sorted(tokenizer.get_vocab().items())
