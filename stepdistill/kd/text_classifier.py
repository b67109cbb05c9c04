"""Classifiers of texts: an encoder of Transformers with a head on its first token, trained on labels."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..data.labelled_text import TextRows
from ..method import Losses, Method
from ..networks.network import Network
from ..randomness import StepRandom
from .networks import TransformersNetwork
from .reduction import Objective, dense_loss

BATCH = 64  # texts at once


class TextClassifier(TransformersNetwork):
    """A text classifier of Transformers, such as BertForSequenceClassification."""

    @property
    def classes(self) -> dict[int, str]:
        """Class number -> name."""
        module: Any = self.module
        return dict(module.config.id2label)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes] of tokens [B, S]."""
        with self.active():
            logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask.long()).logits
        return logits

    def layers_only(self) -> Self:
        """The same weights, of which embeddings and layers train; pooler and head are frozen, also in this network."""
        module: Any = self.module
        base: nn.Module = module.base_model
        layers = {id(p) for name, p in base.named_parameters() if not name.startswith("pooler.")}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in layers)
        return self._as_it_trains()

    def whole(self) -> Self:
        """The same weights, all of which train."""
        self.module.requires_grad_(True)
        return self._as_it_trains()

    def _as_it_trains(self) -> Self:
        """A role of its own: what trains in another one of these weights is that one's matter."""
        twin = copy.copy(self)
        twin._fix_trainable()
        return twin


class TextLabels(Method):
    """Plain training on labels: fine-tunes a teacher, and the students that distillation is compared with.

    Args:
        student: in train mode.
    """

    def __init__(self, student: TextClassifier) -> None:
        self.student = student.whole()

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        logits = self.student(batch.extra["input_ids"], batch.extra["attention_mask"])
        texts = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        found = dense_loss(Objective(kd_weight=0.0, ce_weight=1.0), logits, None, texts, batch.extra["labels"])
        return labelled_texts({"cross_entropy": found.mean}, {}, logits, batch)


def labelled_texts(terms: dict[str, Tensor], metrics: dict[str, Tensor], logits: Tensor, batch: Batch) -> Losses:
    """Means over texts, with the accuracy beside them."""
    right = (logits.detach().argmax(1) == batch.extra["labels"]).float().mean()
    return Losses(terms, {**metrics, "accuracy": right}, count=float(len(logits)))


def accuracy(classifier: TextClassifier, rows: TextRows) -> float:
    """The share of texts whose likeliest class is theirs."""
    device, right = next(classifier.module.parameters()).device, 0
    with classifier.evaluating():
        for start in range(0, len(rows), BATCH):
            indices = range(start, min(start + BATCH, len(rows)))
            batch = rows.batch(indices, StepRandom(0, 0, indices)).to(device)
            found = classifier(batch.extra["input_ids"], batch.extra["attention_mask"]).argmax(1)
            right += int((found == batch.extra["labels"]).sum())
    return right / len(rows)
