"""Distillation of a causal language model on given text: the student's next-token distribution meets the teacher's.

With the forward KL this is word-level knowledge distillation (arXiv 1503.02531; arXiv 1606.07947, section 3.1); text that the
teacher wrote makes it the sequence-level kind (section 3.2 there). Student and teacher read the same tokens under the same mask
and positions. Where both heads are plain, logits never exist as a whole: the loss goes through the vocabulary in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..batch import Batch
from ..data.tokens import Tokens
from ..errors import InputError
from ..method import Losses, Method
from ..networks.network import Network
from .chunked import CHUNK
from .divergences import Divergence
from .networks import CausalLM
from .reduction import Objective
from .signal import Signal, signal_of, token_loss


@dataclass
class LanguageModelKDConfig:
    """Distillation on text.

    Attributes:
        divergence: between the two next-token distributions, and its temperature.
        kd_weight: of the divergence.
        ce_weight: of the cross-entropy on the text itself, at temperature 1.
        chunk_size: tokens whose logits exist at once, where heads are factored (plain linear layers; others give all logits
            of a batch at once): memory against speed, the same result.
    """

    divergence: Divergence = field(default_factory=Divergence)
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        check_weights(self.kd_weight, self.ce_weight)
        if self.chunk_size < 1:
            raise InputError(f"expected chunk_size >= 1, got {self.chunk_size}; fix --method.chunk_size")

    def objective(self) -> Objective:
        """What is minimised a token."""
        return Objective(self.divergence, self.kd_weight, self.ce_weight)


def check_weights(kd_weight: float, ce_weight: float) -> None:
    """InputError for negative or infinite weights, and without a teacher's share: that would be no distillation."""
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0.0 <= value < float("inf"):
            raise InputError(f"expected {name} >= 0, got {value}; fix --method.{name}")
    if kd_weight == 0.0:
        raise InputError("expected kd_weight > 0, got 0, which leaves the teacher out; fix --method.kd_weight")


class LanguageModelKD(Method):
    """Trains `student` towards `teacher` on the data's tokens.

    Args:
        config: the constants.
        student: in train mode.
        teacher: a frozen model, or any :class:`.signal.Signal`.

    Raises InputError for an objective or a student that the signal can't serve.
    """

    def __init__(self, config: LanguageModelKDConfig, student: CausalLM, teacher: CausalLM | Signal) -> None:
        self.config, self.student, self.signal = config, student, signal_of(teacher)
        self.note = self.signal.check(config.objective(), student)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        return self.signal.loss(self.config.objective(), self.student, batch, self.config.chunk_size).losses()

    def watch(self, means: Mapping[str, float]) -> str:
        note, self.note = self.note, ""
        return note


class NextToken(Method):
    """Plain training on the text: of a teacher before, and of the students that distillation is compared with.

    Args:
        student: in train mode.
    """

    def __init__(self, student: CausalLM) -> None:
        self.student = student

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        found = token_loss(Objective(kd_weight=0.0, ce_weight=1.0), self.student, None, Tokens.of(batch))
        return Losses({"cross_entropy": found.mean}, count=float(found.count))
