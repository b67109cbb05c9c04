"""TinyBERT (arXiv 1909.10351): a small encoder takes over what a large one computes layer by layer, then what it answers.

Two stages, both with :class:`TinyBERTLayers`: on general text with the pre-trained teacher, then on a task with the fine-tuned
one (2a); at last the task's answers, :class:`TinyBERTPrediction` (2b). Every mean is taken text by text, over its real tokens
and the pairs of them alone (eq. 5 sums over texts): padding is in no sum and in no denominator, and texts are the count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config import CommaList
from ..errors import InputError
from ..method import Losses, Method, Phase
from ..networks.network import Module, Network
from ..randomness import StepRandom
from .attention import Shape, inside
from .divergences import log_probs
from .layouts import seeded
from .networks import TransformersNetwork, smaller_teacher
from .text_classifier import TextClassifier, labelled_texts


@dataclass
class TinyBERTConfig:
    """TinyBERT.

    Attributes:
        attention_weight: of the attention scores' distance; 0 where student and teacher differ in their number of heads.
        hidden_weight: of the hidden states' distance, embeddings included.
        layers: the teacher's layer for each of the student's, from 1, such as 3,6,9,12; every N/M-th by default.
        temperature: t of the answers (2b); the loss has no factor t^2, as in the paper.
        layers_rate: learning rate of stages 1 and 2a as a factor on the run's, which is 2b's.
    """

    attention_weight: float = 1.0
    hidden_weight: float = 1.0
    layers: CommaList | None = None
    temperature: float = 1.0
    layers_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.attention_weight < math.inf:
            raise InputError(
                f"expected attention_weight >= 0, got {self.attention_weight}; fix --method.attention_weight"
            )
        for name in ("hidden_weight", "temperature", "layers_rate"):
            if not 0.0 < (value := vars(self)[name]) < math.inf:
                raise InputError(f"expected {name} > 0, got {value}; fix --method.{name}")
        self.stated()

    def stated(self) -> tuple[int, ...] | None:
        """`layers` as numbers."""
        return None if self.layers is None else self.layers.ints()


def layer_map(student: int, teacher: int, stated: Sequence[int] | None = None) -> tuple[int, ...]:
    """n = g(m) for m = 0 .. M: the teacher's layer that each of the student's M learns from; 0 is the embeddings, g(0) = 0.

    g(m) = m N / M where nothing is stated (section 4.1: 3 m for 4 layers of 12). Raises InputError for maps that don't fit.
    """
    if student > teacher:
        raise InputError(
            f"expected up to the teacher's {teacher} layers in the student, got {student}; fix --student.layers (a map, "
            "--method.layers, names one of the teacher's for each)"
        )
    if stated is None:
        if teacher % student:
            raise InputError(
                f"expected a multiple of the student's {student} layers in the teacher, got {teacher}; state a map, such as "
                f"--method.layers {','.join(str(round(m * teacher / student)) for m in range(1, student + 1))}"
            )
        return tuple(m * teacher // student for m in range(student + 1))
    if len(stated) != student or list(stated) != sorted(set(stated)) or not 1 <= stated[0] <= stated[-1] <= teacher:
        raise InputError(
            f"expected {student} ascending layers of the teacher's 1 .. {teacher}, one for each of the student's, got "
            f"{','.join(map(str, stated))}; fix --method.layers"
        )
    return (0, *stated)


class Projection(nn.Module):
    """From the student's width to the teacher's: W_e for the embeddings (eq. 9), one W_h for all layers (eq. 8), no biases.

    Where the widths are one it starts as the identity, else with columns of unit length on average.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.embeddings, self.layers = (nn.Linear(student, teacher, bias=False) for _ in range(2))
        for part in (self.embeddings, self.layers):
            if student == teacher:
                nn.init.eye_(part.weight)
            else:
                nn.init.normal_(part.weight, std=student**-0.5)

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """M + 1 of [B, S, d_S] -> [B, S, d_T]."""
        return [self.embeddings(hidden[0]), *(self.layers(h) for h in hidden[1:])]


def projection(student: Network, teacher: Network, seed: int) -> Module:
    """What takes the student's hidden states to the teacher's width: a role that trains with the student; not exported."""
    ours, theirs = Shape.of(student).width, Shape.of(teacher).width
    made: nn.Module = seeded(seed, lambda: Projection(ours, theirs))
    return Module(made.to(next(student.module.parameters()).device))


def hidden_distance(ours: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
    """Eq. 8 and 9, MSE(H_S W, H_T) of each text over its real tokens: [B, S, d] twice, real [B, S] bool -> [B]."""
    error = _difference(ours, theirs).masked_fill(~real[..., None], 0.0).square().sum((1, 2))
    return error / (real.sum(1) * theirs.shape[-1]).clamp(min=1)


def attention_distance(ours: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
    """Eq. 7, the mean over heads of MSE(A_S, A_T), of each text over its pairs of real tokens: [B, h, S, S] twice -> [B]."""
    pairs = (real[:, None, :] & real[:, :, None])[
        :, None
    ]  # masked by lengths; scores are finite at padding, and meaningless
    error = _difference(ours, theirs).masked_fill(~pairs, 0.0).square().sum((1, 2, 3))
    return error / (theirs.shape[1] * real.sum(1) ** 2).clamp(min=1)


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """In float32 at least: squares of half-precision scores overflow."""
    wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    return ours.to(wide) - theirs.detach().to(wide)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Eq. 10, CE(z_T / t, z_S / t) of each text: [B, C] logits twice -> [B]. At least the teacher's own entropy."""
    wanted, found = log_probs(teacher.detach(), temperature), log_probs(student, temperature)
    return -(wanted.exp() * found).sum(-1)


class TinyBERTLayers(Method):
    """Stages 1 and 2a: hidden states and attention scores of the student's layers towards the teacher's.

    Args:
        config: the constants.
        student: in train mode. Its head and pooler, which nothing here reaches, are frozen from here on;
            :class:`TinyBERTPrediction` wakes them.
        teacher: frozen; a masked language model in stage 1, the fine-tuned classifier in 2a.
        projection: of :func:`projection`; the same in both stages, so that it goes on learning.

    Raises InputError for layers and heads that don't fit, and recomputed activations.
    """

    def __init__(
        self, config: TinyBERTConfig, student: TextClassifier, teacher: TransformersNetwork, projection: Module
    ) -> None:
        self.config, self.student, self.teacher, self.projection = config, student.layers_only(), teacher, projection
        self.map = check_shapes(config, Shape.of(student), Shape.of(teacher))
        if config.attention_weight and student.recomputes:
            raise InputError(
                "expected the attention scores of the forward itself, got activations that are computed again in backward; "
                "give --train.gradient_checkpointing false, or --method.attention_weight 0"
            )
        self.note = smaller_teacher(student, teacher)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "projection": self.projection}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("student", "projection"), self.training_step, rate=self.config.layers_rate),)

    def training_step(self, batch: Batch) -> Losses:
        ids, real = batch.extra["input_ids"], batch.extra["attention_mask"].bool()
        attention = self.config.attention_weight > 0
        with torch.no_grad():
            theirs = inside(self.teacher, ids, real, attention)
        ours = inside(self.student, ids, real, attention)
        projected = self.projection(ours.hidden)
        hidden = [hidden_distance(h, theirs.hidden[n], real) for h, n in zip(projected, self.map, strict=True)]
        terms = {"hidden": self.config.hidden_weight * torch.stack(hidden).sum(0).mean()}  # eq. 6, lambda_m = 1; eq. 11
        if attention:
            pairs = zip(ours.scores, self.map[1:], strict=True)
            apart = [attention_distance(a, theirs.scores[n - 1], real) for a, n in pairs]  # no others are computed
            terms["attention"] = self.config.attention_weight * torch.stack(apart).sum(0).mean()
        return Losses(terms, {"embeddings": hidden[0].detach().mean()}, count=float(len(ids)))

    def probe(self, length: int) -> None:
        """Reads made-up tokens [1, length]. InputError for what only a forward tells: attention without scores to compare."""
        ids = torch.arange(length, device=next(self.student.module.parameters()).device)[None] % 4
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
        with self.student.evaluating(), self.teacher.evaluating():
            self.training_step(Batch(None, {}, {}, StepRandom(0, 0, [0]), given))

    def watch(self, means: Mapping[str, float]) -> str:
        note, self.note = self.note, ""
        return note


def check_shapes(config: TinyBERTConfig, student: Shape, teacher: Shape) -> tuple[int, ...]:
    """The layer map; InputError for shapes that the config can't align. To be asked before anything is trained."""
    if config.attention_weight and student.heads != teacher.heads:
        raise InputError(
            f"expected as many attention heads in the student as in the teacher, to align head with head, got {student.heads} "
            f"and {teacher.heads}; give --student.heads {teacher.heads}, or --method.attention_weight 0 for hidden states alone"
        )
    return layer_map(student.layers, teacher.layers, config.stated())


class TinyBERTPrediction(Method):
    """Stage 2b: the student's answers towards the teacher's, without labels. All of the student trains.

    Args:
        config: the constants.
        student: in train mode.
        teacher: frozen, fine-tuned; of the same classes in the same order.
    """

    def __init__(self, config: TinyBERTConfig, student: TextClassifier, teacher: TextClassifier) -> None:
        self.config, self.student, self.teacher = config, student.whole(), teacher
        if student.classes != teacher.classes:
            raise InputError(
                f"expected student and teacher of the same classes, got {list(student.classes.values())} and "
                f"{list(teacher.classes.values())}; fix --stages.fine_tuned"
            )

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        given = batch.extra["input_ids"], batch.extra["attention_mask"]
        with torch.no_grad():
            wanted = self.teacher(*given)
        found, t = self.student(*given), self.config.temperature
        loss = soft_cross_entropy(found, wanted, t)
        kl = (loss - soft_cross_entropy(wanted, wanted, t)).detach().mean()
        return labelled_texts({"prediction": loss.mean()}, {"kl": kl}, found, batch)
