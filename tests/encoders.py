"""Tiny encoders and texts for the tests of TinyBERT. Everything is a function of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from language import built
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.data.labelled_text import TextRow, TextRows
from stepdistill.kd.text_classifier import TextClassifier
from stepdistill.networks.lora import StudentConfig
from stepdistill.randomness import StepRandom

WORDS, CLASSES = 40, ("bread", "cheese", "wine")
FULL = StudentConfig(kind="full")


def bert(
    seed: int, layers: int = 2, width: int = 12, heads: int = 3, classes: Sequence[str] = CLASSES, **more: Any
) -> Any:
    """BertForSequenceClassification without dropout, its weights larger than they are usually at first."""
    from transformers import BertConfig, BertForSequenceClassification

    options = {
        "vocab_size": WORDS, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 2 * width, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3, "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }  # fmt: skip
    return built(seed, lambda: BertForSequenceClassification(BertConfig(**{**options, **more})))


def student(seed: int = 1, **changes: Any) -> TextClassifier:
    return TextClassifier(bert(seed, **changes)).student(FULL)


def teacher(seed: int = 0, **changes: Any) -> TextClassifier:
    return TextClassifier(bert(seed, **{"layers": 4, "width": 18, **changes})).frozen()


def texts(count: int = 24, longest: int = 11, pad: int = 0) -> TextRows:
    """Texts of 3 .. `longest` tokens, [CLS] 2 before and [SEP] 3 after them."""
    draws, rows = torch.Generator().manual_seed(3), []
    for i in range(count):
        length = 1 + (5 * i) % (longest - 2)
        words = torch.randint(4, WORDS, (length,), generator=draws).tolist()
        rows.append(TextRow((2, *words, 3), i % len(CLASSES)))
    return TextRows(rows, pad)


def batch_of(rows: TextRows, indices: Sequence[int]) -> Batch:
    return rows.batch(indices, StepRandom(0, 0, indices))


def more_padding(batch: Batch, by: int, fill: int = 7) -> Batch:
    """The same texts with `by` more places of padding, which hold another token."""
    ids, mask = batch.extra["input_ids"].clone(), batch.extra["attention_mask"]
    ids[~mask] = fill
    wide: dict[str, Tensor] = {
        "input_ids": torch.nn.functional.pad(ids, (0, by), value=fill),
        "attention_mask": torch.nn.functional.pad(mask, (0, by), value=False),
        "labels": batch.extra["labels"],
    }
    return Batch(None, {}, {}, batch.rng, wide)


def scores_by_hand(module: Any, layer: int, hidden: Tensor, heads: int) -> Tensor:
    """Q K^T / sqrt(d) of a layer, one head after the other, from its weights and what went into it."""
    part = module.bert.encoder.layer[layer].attention.self
    q, k = part.query(hidden), part.key(hidden)
    size = q.shape[-1] // heads
    found = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        found.append(torch.einsum("bid,bjd->bij", q[..., own], k[..., own]) / size**0.5)
    return torch.stack(found, 1)
