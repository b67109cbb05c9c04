"""DistiLLM (arXiv 2402.03898): a skewed KL, on the student's own text as far as its validation loss asks for, mostly replayed.

Each step draws who writes its text: the data, the student as it is now, or an earlier one (a replay buffer). The probability
phi of the student's text begins at 0 and rises when the loss on held-out text does; of phi, the share that is written anew
falls linearly over the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..data.gathering import from_all
from ..data.tokens import TokenRows, Tokens
from ..errors import InputError
from ..method import Losses, Method
from ..networks.network import Network
from .chunked import CHUNK
from .divergences import Divergence
from .evaluation import mean_nll
from .language_model import check_weights, token_loss
from .networks import CausalLM, smaller_teacher
from .reduction import Objective
from .replay import Replay, packed, unpacked
from .rollouts import TO_WRITE, check_prompts, generate

Source = Literal["data", "student", "replay"]


@dataclass
class DistiLLMConfig:
    """DistiLLM.

    Attributes:
        divergence: between the next-token distributions; skew_kl with alpha 0.1 by default.
        threshold: phi at first, the probability of the student's own text.
        threshold_step: what phi rises by.
        tolerance: how much the validation loss has to rise for it, nats a token.
        validate_every: steps between validations.
        validation_rows: held-out sequences that are read for it, at most.
        capacity: texts in the buffer.
        max_new_tokens: the most that the student writes after a prompt.
        kd_weight: of the divergence.
        ce_weight: of the cross-entropy on the data's text, in the steps that use it.
        chunk_size: tokens whose logits exist at once, where heads are factored (plain linear layers; others give all logits
            of a batch at once): memory against speed, the same result.
    """

    divergence: Divergence = field(default_factory=lambda: Divergence("skew_kl", alpha=0.1))
    threshold: float = 0.0
    threshold_step: float = 0.1
    tolerance: float = 0.1
    validate_every: int = 100
    validation_rows: int = 256
    capacity: int = 1000
    max_new_tokens: int = 64
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        check_weights(self.kd_weight, self.ce_weight)
        for name in ("threshold", "threshold_step"):
            if not 0.0 <= (value := vars(self)[name]) <= 1.0:
                raise InputError(f"expected {name} in [0, 1], got {value}; fix --method.{name}")
        if not math.isfinite(self.tolerance):
            raise InputError(f"expected a finite tolerance, got {self.tolerance}; fix --method.tolerance")
        for name in ("validate_every", "validation_rows", "capacity", "max_new_tokens", "chunk_size"):
            if (number := vars(self)[name]) < 1:
                raise InputError(f"expected {name} >= 1, got {number}; fix --method.{name}")


@dataclass
class Scheduler:
    """phi, and the validation loss that a rise is measured from.

    Attributes:
        phi: the probability of the student's own text.
        last: the first validation loss, and after a rise of phi the one that was its reason, as in the authors' code; algorithm
            1 compares with the validation before.
        step: what phi rises by.
        tolerance: of the loss.
    """

    phi: float
    last: float | None
    step: float
    tolerance: float

    def see(self, loss: float) -> None:
        """A validation loss."""
        if self.last is None or math.isnan(self.last):  # nothing is above nan, and phi would never rise
            self.last = loss
        elif loss >= self.last + self.tolerance:
            self.phi, self.last = min(self.phi + self.step, 1.0), loss  # algorithm 1: phi <- min(phi + 1 / N_phi, 1)

    def source(self, r: float, progress: float, full: bool) -> Source:
        """Who writes where r in [0, 1) was drawn, `progress` of the run is made, and the buffer is full or not."""
        fresh = self.phi * (1.0 - progress)  # lambda_R = phi (1 - t / T), section 3.2
        if r < fresh or (r < self.phi and not full):
            return "student"
        return "replay" if r < self.phi else "data"


class DistiLLM(Method):
    """Distils `teacher` into `student` on the data's text and the student's own, new or replayed.

    Args:
        config: the constants.
        student: in train mode, fine-tuned; dropout is off while it writes.
        teacher: frozen.
        data: what it will train on, prompts with completions.
        held_out: what the validation loss is taken on, with completions.
        end: the end-of-text token.
        steps: of the whole fit.

    Raises InputError for data without prompts or without completions, and prompts that leave no room in a model's window.
    """

    def __init__(
        self, config: DistiLLMConfig, student: CausalLM, teacher: CausalLM, data: TokenRows, held_out: TokenRows,
        end: int, steps: int,
    ) -> None:  # fmt: skip
        self.config, self.student, self.teacher, self.end, self.steps = config, student, teacher, end, steps
        self.objective = Objective(config.divergence, config.kd_weight, config.ce_weight)
        self.own = replace(self.objective, ce_weight=0.0)  # the student's samples are not to be imitated
        self.note, self.held_out = smaller_teacher(student, teacher), held_out
        check_prompts(data, config.max_new_tokens, student, teacher)
        if not (data.completed and held_out.completed):
            raise InputError(
                "expected completions, which training begins with and validation reads, got prompts alone; give a "
                "`completion` column, or take recipes/gkd.py with --method.lmbda 1"
            )
        self.scheduler = Scheduler(config.threshold, None, config.threshold_step, config.tolerance)
        self.replay = Replay(config.capacity, data.longest_prompt + config.max_new_tokens)
        self.done = 0  # steps of this fit; the trainer's count those of earlier fits too
        self._fresh: list[Tensor] = []  # written in this step
        self._fresh_at = -1

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    @property
    def needs_whole(self) -> str:
        return TO_WRITE

    def training_step(self, batch: Batch) -> Losses:
        if self._fresh_at != self.step:  # whether the step before was skipped or not
            self._fresh, self._fresh_at = [], self.step
        if self.scheduler.last is None:
            self.validate()
        source = self.source(batch)
        objective = self.objective if source == "data" else self.own
        tokens = self.text(source, batch)
        losses = token_loss(objective, self.student, self.teacher, tokens, self.config.chunk_size).losses()
        told = {"written": source == "student", "replayed": source == "replay", "threshold": self.scheduler.phi}
        losses.metrics.update({name: losses.total.new_tensor(float(value)).detach() for name, value in told.items()})
        return losses

    def source(self, batch: Batch) -> Source:
        """Who writes this step's text; all processes and micro-batches agree."""
        r = batch.rng.shared("who writes")
        return self.scheduler.source(r, (self.done + 1) / self.steps, self.replay.is_full)  # t = 1 .. T

    def text(self, source: Source, batch: Batch) -> Tokens:
        """This micro-batch's text by `source`; what the student writes is kept for the end of the step."""
        if source == "data":
            return Tokens.of(batch)
        if source == "replay":
            return unpacked(self.replay.draw(batch.rng).to(batch.extra["prompt_ids"].device), self.end)
        given = batch.extra["prompt_ids"], batch.extra["prompt_mask"]
        found = generate(self.student, *given, self.config.max_new_tokens, self.end, batch.rng.scoped("rollout"))
        rows = packed(found, self.replay.width)
        self._fresh.append(torch.cat([rows.new_tensor(batch.rng.positions)[:, None], rows], 1))
        return found

    def validate(self) -> None:
        """Shows the scheduler the loss on held-out text."""
        if self.student.is_shared_out:
            raise InputError(f"expected whole weights {TO_WRITE}, got shards of them; use --train.parallel ddp")
        parameter = self.student.trainable()[0]
        with torch.autocast(parameter.device.type, enabled=False):  # in one precision, in a step as after it
            loss = mean_nll(self.student, self.held_out, self.config.validation_rows)
        # one process's number for all: a last bit that differs would give them different thresholds
        self.scheduler.see(float(from_all(torch.tensor([loss], dtype=torch.float32, device=parameter.device))[0]))

    def watch(self, means: Mapping[str, float]) -> str:
        note, self.note = self.note, ""
        return note

    def after_step(self) -> None:
        if self._fresh:
            rows = from_all(torch.cat(self._fresh))
            self.replay.push(rows[rows[:, 0].argsort()][:, 1:])  # in the order of the global batch
        self.done += 1
        if self.done % self.config.validate_every == 0:
            self.validate()

    def state_dict(self) -> dict[str, Any]:
        kept = {"replay": self.replay.rows} if len(self.replay) else {}
        return {"phi": self.scheduler.phi, "last": self.scheduler.last, "done": self.done, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.phi, self.scheduler.last, self.done = state["phi"], state["last"], state["done"]
        self.replay.rows = state.get("replay", self.replay.rows[:0])
