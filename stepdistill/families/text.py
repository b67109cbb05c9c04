"""Prompts as CLIP's text encoders take them, the same for every family that has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """`input_ids` and `attention_mask` [B, L], padded and cut to the tokenizer's own length, as the stock pipelines do it."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def facts(tokenizer: Any) -> tuple[Any, ...]:
    """What decides the tokens of a prompt."""
    return tokenizer.model_max_length, tokenizer.pad_token_id, sorted(tokenizer.get_vocab().items())
