"""Generalised knowledge distillation (GKD, arXiv 2306.13649): the student learns on what it writes itself.

Each step draws who writes the batch (algorithm 1): with probability lmbda the student completes the prompts and the teacher
judges every token it wrote; else the text is the data's. Nothing flows through the sampling, and the student is never told that
its own samples are right (no cross-entropy on them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..batch import Batch
from ..data.tokens import TokenRows, Tokens
from ..errors import InputError
from ..method import Losses, Method
from ..networks.network import Network
from .chunked import CHUNK
from .divergences import Divergence
from .language_model import check_weights, token_loss
from .networks import CausalLM, smaller_teacher
from .reduction import Objective
from .rollouts import TO_WRITE, check_prompts, generate

LMBDA = 0.5


@dataclass
class GKDConfig:
    """Generalised knowledge distillation.

    Attributes:
        lmbda: the share of steps whose text the STUDENT writes: 1 is fully on-policy, 0 is the data alone.
        on_policy_fraction: the same by a plain name; give one of the two.
        max_new_tokens: the most that the student writes after a prompt.
        divergence: between the next-token distributions; jsd with beta 0.5 by default.
        kd_weight: of the divergence.
        ce_weight: of the cross-entropy on the data's text, in the steps that use it.
        chunk_size: tokens whose logits exist at once, where heads are factored (plain linear layers; others give all logits
            of a batch at once): memory against speed, the same result.
    """

    lmbda: float = LMBDA
    on_policy_fraction: float | None = None
    max_new_tokens: int = 64
    divergence: Divergence = field(default_factory=lambda: Divergence("jsd"))
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        check_weights(self.kd_weight, self.ce_weight)
        for name, value in (("lmbda", self.lmbda), ("on_policy_fraction", self.on_policy_fraction)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise InputError(f"expected {name} in [0, 1], got {value}; fix --method.{name}")
        if self.on_policy_fraction is not None and self.lmbda not in (LMBDA, self.on_policy_fraction):
            raise InputError(
                f"expected lmbda or on_policy_fraction, which are one thing, got {self.lmbda} and {self.on_policy_fraction}; "
                "drop --method.lmbda"
            )
        for name in ("max_new_tokens", "chunk_size"):
            if (number := vars(self)[name]) < 1:
                raise InputError(f"expected {name} >= 1, got {number}; fix --method.{name}")

    @property
    def share(self) -> float:
        """Of the steps, how many are the student's own text."""
        return self.lmbda if self.on_policy_fraction is None else self.on_policy_fraction


class GKD(Method):
    """Distils `teacher` into `student` on the student's own text and the data's.

    Args:
        config: the constants.
        student: in train mode; dropout is off while it writes.
        teacher: frozen.
        data: what it will train on, with prompts.
        end: the end-of-text token.

    Raises InputError for data without prompts, prompts alone where the data's text is needed too, and prompts that leave no
    room in a model's window. Shared out (fsdp) it can be only where it writes nothing.
    """

    def __init__(self, config: GKDConfig, student: CausalLM, teacher: CausalLM, data: TokenRows, end: int) -> None:
        self.config, self.student, self.teacher, self.end = config, student, teacher, end
        self.objective = Objective(config.divergence, config.kd_weight, config.ce_weight)
        self.on_policy = replace(self.objective, ce_weight=0.0)  # the student's samples are not to be imitated
        self.note = smaller_teacher(student, teacher)
        self._check(data)

    def _check(self, data: TokenRows) -> None:
        if self.config.share > 0:
            check_prompts(data, self.config.max_new_tokens, self.student, self.teacher)
        if self.config.share < 1 and not data.completed:
            raise InputError(
                f"expected completions for the {1 - self.config.share:.0%} of steps that use the data's text, got prompts "
                "alone; give --method.lmbda 1, or a `completion` column"
            )

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    @property
    def needs_whole(self) -> str:
        return TO_WRITE if self.config.share > 0 else ""

    def training_step(self, batch: Batch) -> Losses:
        own = batch.rng.shared("who writes") < self.config.share  # algorithm 1, line 3: u <= lambda
        tokens = self.written(batch) if own else Tokens.of(batch)
        objective = self.on_policy if own else self.objective
        losses = token_loss(objective, self.student, self.teacher, tokens, self.config.chunk_size).losses()
        losses.metrics["on_policy"] = losses.total.new_tensor(float(own)).detach()
        return losses

    def written(self, batch: Batch) -> Tokens:
        """The batch's prompts, completed by the student as it is now."""
        given = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
        return generate(self.student, *given, self.config.max_new_tokens, self.end, batch.rng.scoped("rollout"))

    def watch(self, means: Mapping[str, float]) -> str:
        note, self.note = self.note, ""
        return note
