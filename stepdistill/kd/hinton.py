"""Knowledge distillation of classifiers (Hinton et al., arXiv 1503.02531): a student learns the teacher's soft answers.

kd_weight T^2 KL(p_T || q_T) + ce_weight CE(label, q): both distributions at temperature T in the first term, whose gradient T^2
keeps at one size whatever T is (section 2); labels at T = 1. The weights are named, since "alpha" has meant either.

Networks with batch norm see their micro-batch: for them how a batch is cut, and over how many processes, is part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..method import Losses, Method
from ..networks.network import Network
from .divergences import Divergence
from .language_model import check_weights
from .networks import Classifier, smaller_teacher
from .reduction import Objective, dense_loss


@dataclass
class HintonConfig:
    """Distillation of a classifier.

    Attributes:
        temperature: T of the soft term.
        kd_weight: of it.
        ce_weight: of the cross-entropy on the labels, at temperature 1; 0 needs no labels.
    """

    temperature: float = 4.0
    kd_weight: float = 0.9
    ce_weight: float = 0.1

    def __post_init__(self) -> None:
        check_weights(self.kd_weight, self.ce_weight)
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"expected a temperature > 0, got {self.temperature}; fix --method.temperature")

    def objective(self) -> Objective:
        """What is minimised an image."""
        return Objective(Divergence("forward_kl", temperature=self.temperature), self.kd_weight, self.ce_weight)


class Hinton(Method):
    """Trains `student` towards `teacher` on images, and their labels `Batch.extra["labels"]` [B].

    Args:
        config: the constants.
        student: in train mode.
        teacher: frozen, in eval mode; of the same classes in the same order.
    """

    def __init__(self, config: HintonConfig, student: Classifier, teacher: Classifier) -> None:
        self.objective, self.student, self.teacher = config.objective(), student, teacher
        self.note = smaller_teacher(student, teacher)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        images = batch.data()
        with torch.no_grad():
            wanted = self.teacher(images)
        return _losses(self.objective, self.student(images), wanted, batch)

    def watch(self, means: Mapping[str, float]) -> str:
        note, self.note = self.note, ""
        return note


class HardLabels(Method):
    """Plain training on labels: of a teacher before, and of the students that distillation is compared with.

    Args:
        student: in train mode.
    """

    def __init__(self, student: Classifier) -> None:
        self.student = student

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        return _losses(Objective(kd_weight=0.0, ce_weight=1.0), self.student(batch.data()), None, batch)


def _losses(objective: Objective, logits: Tensor, wanted: Tensor | None, batch: Batch) -> Losses:
    """Means over the batch: the sum over classes is divided by the images alone ("batchmean" of [B, V])."""
    if wanted is not None and wanted.shape != logits.shape:
        raise ValueError(f"expected a teacher of the same classes, got {list(wanted.shape)} for {list(logits.shape)}")
    labels = batch.extra["labels"] if objective.ce_weight else None
    images = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    losses = dense_loss(objective, logits, wanted, images, labels).losses("loss_of_images")
    if "labels" in batch.extra:
        losses.metrics["accuracy"] = (logits.detach().argmax(1) == batch.extra["labels"]).float().mean()
    return losses
