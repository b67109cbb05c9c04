"""MiniLLM (arXiv 2306.08543): the student learns the reverse KL over whole sequences, on text that it and its teacher write.

Each step writes from the batch's prompts and makes one update of it (algorithm 1), so that no ratio between an old and a new
student is needed, nor a clip on it. All sums are over tokens, and are divided by the batch and by `max_new_tokens`: a constant,
since a mean over the tokens that happened to be written would be a ratio estimate, which prefers some lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..batch import Batch
from ..data.tokens import TokenRows, Tokens
from ..errors import InputError
from ..method import Losses, Method
from ..networks.network import Network
from .chunked import CHUNK
from .divergences import Divergence
from .language_model import token_loss
from .networks import CausalLM, smaller_teacher
from .policy_gradient import PolicyGradient, Variant, Weights, Written
from .reduction import Objective, next_token
from .rollouts import TO_WRITE, Mixture, check_prompts, generate
from .wide_logits import wide_logits

REVERSE = Divergence("reverse_kl")


@dataclass
class MiniLLMConfig:
    """MiniLLM.

    Attributes:
        variant: "paper", or "reference" for what the authors' code computes, which counts a token's own log-ratio twice.
        max_new_tokens: the most that is written after a prompt.
        teacher_share: the teacher's share in the distribution that each token is drawn from; 0 is the student alone.
        importance_weights: "token", the paper's approximation, or "exact", unbiased and of a variance that grows with length.
        length_normalised: whether returns are means over the tokens after a token instead of sums; biased by design.
        reward_clip: log-ratios of single tokens count up to +- this; none by default.
        whitened: whether returns are shifted and scaled to mean 0 and deviation 1, by those of the step before.
        lm_weight: of the cross-entropy on the data's own completions, summed and divided by max_new_tokens as all sums are; 0
            needs none.
        chunk_size: tokens whose logits exist at once, where heads are factored (plain linear layers; others give all logits
            of a batch at once): memory against speed, the same result.
    """

    variant: Variant = "paper"
    max_new_tokens: int = 64
    teacher_share: float = 0.2
    importance_weights: Weights = "token"
    length_normalised: bool = True
    reward_clip: float | None = None
    whitened: bool = False
    lm_weight: float = 0.0
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        for name, known in (("variant", Variant), ("importance_weights", Weights)):
            if (value := vars(self)[name]) not in get_args(known):
                raise InputError(f"expected {name} in {get_args(known)}, got {value!r}; fix --method.{name}")
        if not 0.0 <= self.teacher_share < 1.0:
            raise InputError(f"expected teacher_share in [0, 1), got {self.teacher_share}; fix --method.teacher_share")
        if self.variant == "reference" and self.importance_weights == "exact":
            raise InputError(
                "expected exact weights with variant paper, got reference, which is no estimator of the KL with any; fix "
                "--method.variant or --method.importance_weights"
            )
        if self.reward_clip is not None and not self.reward_clip > 0.0:
            raise InputError(f"expected reward_clip > 0 or none, got {self.reward_clip}; fix --method.reward_clip")
        if not 0.0 <= self.lm_weight < math.inf:
            raise InputError(f"expected lm_weight >= 0, got {self.lm_weight}; fix --method.lm_weight")
        for name in ("max_new_tokens", "chunk_size"):
            if (number := vars(self)[name]) < 1:
                raise InputError(f"expected {name} >= 1, got {number}; fix --method.{name}")

    def estimator(self) -> PolicyGradient:
        """The gradient's."""
        return PolicyGradient(
            self.variant, self.teacher_share, self.importance_weights, self.length_normalised, self.reward_clip
        )


class MiniLLM(Method):
    """Distils `teacher` into `student` on text that the two write.

    Args:
        config: the constants.
        student: in train mode, fine-tuned; dropout is off while it writes.
        teacher: frozen.
        data: what it will train on, with prompts.
        end: the end-of-text token.

    Raises InputError for data without prompts, prompts that leave no room in a model's window, prompts alone where the data's
    text is to be learned too, and a teacher that can't write along.
    """

    def __init__(self, config: MiniLLMConfig, student: CausalLM, teacher: CausalLM, data: TokenRows, end: int) -> None:
        self.config, self.student, self.teacher, self.end = config, student, teacher, end
        self.gradient = config.estimator()
        self.note = "; ".join(filter(None, [smaller_teacher(student, teacher), dropping(student)]))
        self.centre, self.scale = 0.0, 1.0  # of the returns, for whitening
        self.seen = self.centre, self.scale
        check_prompts(data, config.max_new_tokens, student, teacher)
        if config.teacher_share and "past_key_values" not in teacher.takes:
            raise InputError(
                f"expected a teacher that keeps keys and values while it writes along, got {type(teacher.module).__name__}; "
                "give --method.teacher_share 0, which leaves the writing to the student"
            )
        if config.lm_weight and not data.completed:
            raise InputError(
                "expected completions to learn with lm_weight, got prompts alone; give --method.lm_weight 0, or a "
                "`completion` column"
            )

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    @property
    def needs_whole(self) -> str:
        return TO_WRITE

    def training_step(self, batch: Batch) -> Losses:
        written = scored(self.student, self.teacher, self.written(batch), self.config.chunk_size)
        size = float(len(batch) * self.config.max_new_tokens)
        terms = {"policy_gradient": self.gradient.surrogate(written, self.centre, self.scale).sum() / size}
        returns, kl = self.gradient.returns(written), torch.where(written.mask, written.kl.detach(), 0.0)
        metrics = {
            "reverse_kl": kl.sum() / size, "returns": returns.sum() / size, "squares": returns.square().sum() / size,
            "tokens": written.mask.sum() / size,
        }  # fmt: skip
        if self.config.lm_weight:  # algorithm 1: L_PT
            objective = Objective(kd_weight=0.0, ce_weight=1.0)
            found = token_loss(objective, self.student, None, Tokens.of(batch), self.config.chunk_size)
            terms["language_model"] = self.config.lm_weight * found.total / size
        return Losses(terms, metrics, count=float(len(batch)))

    def written(self, batch: Batch) -> Tokens:
        """The batch's prompts, completed by student and teacher together as the student is now (eq. 4)."""
        ids, mask = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
        mixture = Mixture(self.teacher, self.config.teacher_share, mask)
        return generate(
            self.student, ids, mask, self.config.max_new_tokens, self.end, batch.rng.scoped("rollout"), mixture
        )

    def watch(self, means: Mapping[str, float]) -> str:
        # over all micro-batches and processes, which a batch's own moments would not be
        count = means["tokens"]
        if count > 0 and math.isfinite(means["squares"]):
            centre = means["returns"] / count
            self.seen = centre, math.sqrt(max(means["squares"] / count - centre**2, 0.0) + 1e-8)
        note, self.note = self.note, ""
        return note

    def after_step(self) -> None:
        if self.config.whitened:
            self.centre, self.scale = self.seen

    def state_dict(self) -> dict[str, Any]:
        return {"centre": self.centre, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.centre, self.scale = state["centre"], state["scale"]


def dropping(student: CausalLM) -> str:
    """What to say of a student with dropout: its log-ratios are not those of the network that wrote; "" without any."""
    config = student.config.to_dict()
    found = [
        f"{name} {value:g}"
        for name, value in sorted(config.items())
        if "drop" in name and "class" not in name and "summary" not in name and isinstance(value, float) and value > 0.0
    ]
    if not found:
        return ""
    return (
        f"the student's dropout ({', '.join(found)}) is off where it writes and on where its text is judged, which makes "
        "log-ratios noisy; 0 in its config.json is better here"
    )


def scored(student: CausalLM, teacher: CausalLM, tokens: Tokens, chunk_size: int = CHUNK) -> Written:
    """Both models' opinions of the targets of `tokens` [B, S], as [B, S - 1]; `chunk_size` tokens' logits at a time.

    Logits are made again in the backward pass, which keeps none of them.
    """
    given = tokens.input_ids, tokens.attention_mask
    targets = tokens.input_ids, tokens.loss_mask, tokens.attention_mask
    factored = student.is_factored and teacher.is_factored
    with torch.no_grad():
        theirs, _, _ = next_token(teacher.hidden(*given) if factored else teacher(*given), *targets)
    ours, labels, mask = next_token(student.hidden(*given) if factored else student(*given), *targets)
    h, h_teacher, labels = ours[mask], theirs[mask], labels[mask]

    def opinions(start: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(start, start + chunk_size)
        z, z_teacher = h[rows], h_teacher[rows]
        if factored:
            z, z_teacher = wide_logits(z, student.head), wide_logits(z_teacher, teacher.head)
        log_q, log_p = REVERSE.log_probs(z, z_teacher)
        chosen = labels[rows, None]
        return REVERSE.value(log_q, log_p), log_q.gather(1, chosen).squeeze(1), log_p.gather(1, chosen).squeeze(1)

    parts = [
        checkpoint(opinions, start, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, max(1, len(h)), chunk_size)
    ]
    kl, log_q, log_p = (torch.cat(values) for values in zip(*parts, strict=True))
    empty = kl.new_zeros(mask.shape)
    kl, log_q, log_p = (empty.masked_scatter(mask, values) for values in (kl, log_q, log_p))
    return Written(kl, log_q, log_p.detach(), mask)
