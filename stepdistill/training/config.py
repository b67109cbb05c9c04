"""Options of a training run, named as in Diffusers' training scripts where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import PromptList
from ..errors import InputError


@dataclass
class TrainConfig:
    """Training.

    Attributes:
        max_train_steps: optimizer steps (of each round, for methods that have rounds).
        train_batch_size: samples per process and micro-batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
        gradient_checkpointing: recompute activations in backward, to save memory.
        learning_rate: peak learning rate.
        lr_scheduler: shape of the learning rate over a round.
        lr_warmup_steps: steps of linear warm-up (not with "constant", as in Diffusers).
        adam_beta1: AdamW's first decay.
        adam_beta2: AdamW's second decay.
        adam_weight_decay: AdamW's decoupled weight decay.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: gradients are clipped to this norm; 0 means no clipping.
        ema_decay: keep an exponential moving average of the student's trained weights, and sample and export it.
        mixed_precision: no, fp16 or bf16; Accelerate's own setting by default.
        seed: of everything that is random.
        deterministic: deterministic kernels, for bitwise resume on CUDA.
        checkpointing_steps: a checkpoint every so many steps (and one at the end).
        checkpoints_total_limit: how many are kept, never fewer than 2.
        resume_from_checkpoint: "latest", a step or a checkpoint's folder; continues the run in output_dir.
        validation_prompts: prompts to sample, separated by "|", or a text file with one a line.
        validation_steps: sample them every so many steps; 0 means only at the end.
        report_to: trackers, e.g. tensorboard; none by default.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    seed: int = 0
    deterministic: bool = False
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    validation_prompts: PromptList | None = None
    validation_steps: int = 0
    report_to: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} >= 1, got {getattr(self, name)}; fix --train.{name}")
        for name in ("lr_warmup_steps", "validation_steps", "max_grad_norm", "adam_weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"expected {name} >= 0, got {getattr(self, name)}; fix --train.{name}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"expected {name} in [0, 1), got {getattr(self, name)}; fix --train.{name}")
        if not self.adam_epsilon > 0:
            raise InputError(f"expected adam_epsilon > 0, got {self.adam_epsilon}; fix --train.adam_epsilon")
        if not self.learning_rate > 0:
            raise InputError(f"expected learning_rate > 0, got {self.learning_rate}; fix --train.learning_rate")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise InputError(f"expected ema_decay in [0, 1), got {self.ema_decay}; fix --train.ema_decay")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise InputError(
                f"expected checkpoints_total_limit >= 1, got {self.checkpoints_total_limit}; "
                "fix --train.checkpoints_total_limit (2 are always kept)"
            )
