"""Tiny masked language models, and rows of unequal lengths for them. Everything is a function of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from language import FULL, built

from stepdistill.batch import Batch
from stepdistill.data.masked import Alphabet, MaskedRows, MaskingConfig
from stepdistill.data.tokens import Row
from stepdistill.kd.masked import MaskedLM
from stepdistill.randomness import StepRandom

PAD, BEGIN, SEPARATOR, MASK, VOCABULARY = 0, 1, 2, 3, 40
ALPHABET = Alphabet(BEGIN, SEPARATOR, PAD, MASK, torch.arange(4, VOCABULARY))
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3, "pad_token_id": PAD,
}  # fmt: skip


def masked_model(seed: int, layers: int = 2, kind: str = "bert", **more: Any) -> Any:
    """A masked language model of this kind, its biases and norms drawn too, so that none of them is idle."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    positions = 35 if kind == "roberta" else 32
    options = {**SIZES, "num_hidden_layers": layers, "max_position_embeddings": positions, **more}
    if kind == "distilbert":
        for name in ("intermediate_size", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            options.pop(name)
        options |= {"hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}
    model = built(seed, lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **options)))
    draws = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
    return model


def pupil(seed: int = 1, layers: int = 2, kind: str = "distilbert", **more: Any) -> MaskedLM:
    return MaskedLM(masked_model(seed, layers, kind, **more)).student(FULL)


def sage(seed: int = 0, layers: int = 3, kind: str = "bert", **more: Any) -> MaskedLM:
    return MaskedLM(masked_model(seed, layers, kind, **more)).frozen()


def framed(
    count: int = 24, longest: int = 14, config: MaskingConfig | None = None, fixed: int | None = None
) -> MaskedRows:
    """Rows of 3 .. `longest` tokens, framed, one special token within the longer ones."""
    draws = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        words = torch.randint(4, VOCABULARY, (1 + i * 5 % (longest - 2),), generator=draws).tolist()
        if len(words) > 6:
            words[3] = SEPARATOR
        ids = (BEGIN, *words, SEPARATOR)
        rows.append(Row(ids, tuple(token >= 4 for token in ids)))
    return MaskedRows(rows, ALPHABET, config, fixed)


def taken(data: MaskedRows, indices: Sequence[int], step: int = 0, positions: Sequence[int] | None = None) -> Batch:
    return data.batch(indices, StepRandom(0, step, indices if positions is None else positions))
