"""DistilBERT (arXiv 1910.01108): a masked language model of some layers of its teacher, taught by three losses together.

The teacher's distribution over words at temperature T, the masked words themselves, the direction of the last hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..batch import Batch
from ..config import CommaList
from ..data.masked import MaskedTokens
from ..errors import InputError
from ..method import Losses, Method
from ..networks.lora import StudentConfig
from ..networks.network import Network
from .chunked import CHUNK
from .depth import check_layers, shallower, spread
from .divergences import Divergence
from .masked import MaskedLM, Reading, are_factored, output_loss
from .networks import smaller_teacher
from .reduction import Objective, TokenLoss


@dataclass
class DistilBERTConfig:
    """The triple loss.

    Attributes:
        temperature: of both distributions in the distillation term, which is multiplied by its square.
        kd_weight: of that term, KL(teacher || student).
        mlm_weight: of the cross-entropy at masked tokens, at temperature 1.
        cosine_weight: of 1 - cos(student's, teacher's) of the last hidden states.
        kd_on: tokens of the distillation term: "all" that are no padding, the reference code's default, or "masked" ones alone
            (its --restrict_ce_to_mask). The paper does not say.
        chunk_size: tokens whose logits exist at once, where heads are factored (plain linear layers; others give all logits
            of a batch at once): memory against speed, the same result.
    """

    temperature: float = 2.0
    kd_weight: float = 5.0
    mlm_weight: float = 2.0
    cosine_weight: float = 1.0
    kd_on: Literal["all", "masked"] = "all"
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise InputError(f"expected a temperature > 0, got {self.temperature}; fix --method.temperature")
        for name in ("kd_weight", "mlm_weight", "cosine_weight"):
            if not 0.0 <= (value := vars(self)[name]) < math.inf:
                raise InputError(f"expected {name} >= 0, got {value}; fix --method.{name}")
        if self.kd_weight == self.cosine_weight == 0.0:
            raise InputError(
                "expected a teacher's share, got weights of 0; fix --method.kd_weight or --method.cosine_weight"
            )
        if self.kd_on not in ("all", "masked"):
            raise InputError(f"expected all or masked, got {self.kd_on!r}; fix --method.kd_on")
        if self.chunk_size < 1:
            raise InputError(f"expected chunk_size >= 1, got {self.chunk_size}; fix --method.chunk_size")


@dataclass
class ShallowConfig:
    """The student, made of its teacher's layers.

    Attributes:
        depth: how many layers; half of the teacher's by default.
        layers: which, numbers from 0 separated by commas; spread evenly by default (0,2,4,7,9,11 of 12).
        segment: "kept": the embedding of segment 0 goes into those of positions where the student has none; "dropped": it is
            left out, as in the reference code.
    """

    depth: int | None = None
    layers: CommaList = field(default_factory=CommaList)
    segment: Literal["kept", "dropped"] = "kept"

    def __post_init__(self) -> None:
        if self.segment not in ("kept", "dropped"):
            raise InputError(f"expected kept or dropped, got {self.segment!r}; fix --student.segment")
        try:
            numbers = self.layers.ints()
        except InputError as error:
            raise InputError(f"{error}; fix --student.layers") from error
        if numbers and self.depth not in (None, len(numbers)):
            raise InputError(
                f"expected as many layers as --student.depth says, got {len(numbers)} and {self.depth}; give one of the two"
            )

    def chosen(self, deep: int) -> tuple[int, ...]:
        """Which of a teacher's `deep` layers; InputError where they don't fit."""
        if self.layers:
            return check_layers(self.layers.ints(), deep)
        return spread(deep, max(1, deep // 2) if self.depth is None else self.depth)

    def student(self, teacher: MaskedLM, recompute: bool = False, seed: int | None = None) -> MaskedLM:
        """A student in train mode, the same each time. `seed`: of random weights instead of the teacher's."""
        made = shallower(teacher, self.chosen(teacher.depth), self.segment == "kept", seed)
        student = made.student(StudentConfig(kind="full"))
        student.checkpoint_activations(recompute)
        return student


def cosine_loss(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """The sum of 1 - cos over the tokens of `mask` [B, S] bool, of hidden states [B, S, H]; a scalar, in float32 or wider."""
    rows = mask.flatten().nonzero().squeeze(1)
    a, b = (h.flatten(0, -2).index_select(0, rows) for h in (ours, theirs))
    wide = torch.promote_types(a.dtype, torch.float32)
    return (1.0 - functional.cosine_similarity(a.to(wide), b.to(wide), dim=-1)).sum()


class DistilBERT(Method):
    """Trains `student` with the triple loss of section 2: kd_weight L_ce + mlm_weight L_mlm + cosine_weight L_cos.

    L_ce and L_cos are means over all tokens that are no padding, L_mlm over masked ones. To be the same however a batch is
    split, all are sums over tokens divided by one number, that of tokens which are no padding; a masked token therefore counts
    1 / `share`, with the share of masked tokens in the whole data set. In blocks of one size with as many words each that is
    the mean over masked tokens; elsewhere it is their sum over their expected number.

    Args:
        config: the constants.
        student: in train mode. Its head is frozen where hidden states alone are compared, which do not reach it.
        teacher: frozen, as wide as the student.
        share: :attr:`stepdistill.data.masked.MaskedRows.share` of the data.
    """

    def __init__(self, config: DistilBERTConfig, student: MaskedLM, teacher: MaskedLM, share: float) -> None:
        if student.width != teacher.width:
            raise InputError(
                f"expected a student as wide as its teacher, for their hidden states are compared, got {student.width} and "
                f"{teacher.width}; a narrower one is TinyBERT's matter"
            )
        if not 0.0 < share <= 1.0:
            raise ValueError(f"expected a share of masked tokens in (0, 1], got {share}")
        if config.kd_weight == config.mlm_weight == 0.0:  # DDP waits for a gradient of all that trains
            student = student.layers_only()
        self.config, self.student, self.teacher, self.share = config, student, teacher, share
        self.note = smaller_teacher(student, teacher)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        tokens, config = MaskedTokens.of(batch), self.config
        given, factored = (tokens.input_ids, tokens.attention_mask), are_factored(self.student, self.teacher)
        with torch.no_grad():
            theirs = self.teacher.read(*given, factored)
        ours = self.student.read(*given, factored)
        real = int(tokens.attention_mask.sum())
        total, kd, mlm = self._over_words(ours, theirs, tokens)
        cosine = cosine_loss(ours.last, theirs.last, tokens.attention_mask)  # section 2: L_cos
        total = total + config.cosine_weight * cosine
        metrics = {"kd": kd, "mlm": mlm, "cosine": cosine.detach()}
        return Losses(
            {"distillation": total / max(1, real)},
            {name: value / max(1, real) for name, value in metrics.items()},
            count=float(real),
        )

    def _over_words(self, ours: Reading, theirs: Reading, tokens: MaskedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of L_ce and L_mlm with a graph, and each without; all in units of tokens that are no padding."""
        config, scale = self.config, 1.0 / self.share
        soft = Divergence("forward_kl", temperature=config.temperature)

        def summed(kd: float, mlm: float, mask: Tensor) -> TokenLoss | None:
            if kd == mlm == 0.0:
                return None
            pair = (self.student, ours.outputs, self.teacher, theirs.outputs)
            return output_loss(Objective(soft, kd, mlm), *pair, mask, tokens.labels, config.chunk_size)

        if config.kd_on == "masked":  # one pass over the same tokens
            found = summed(scale * config.kd_weight, scale * config.mlm_weight, tokens.loss_mask)
            parts = [(found, scale)]
        else:
            parts = [
                (summed(config.kd_weight, 0.0, tokens.attention_mask), 1.0),
                (summed(0.0, scale * config.mlm_weight, tokens.loss_mask), scale),
            ]
        zero = ours.last.new_zeros(())
        total = sum((part.total for part, _ in parts if part is not None), zero)
        kd = sum((factor * part.kd for part, factor in parts if part is not None), zero)
        mlm = sum((factor * part.ce for part, factor in parts if part is not None), zero)
        return total, kd, mlm

    def watch(self, means: Mapping[str, float]) -> str:
        note, self.note = self.note, ""
        return note
