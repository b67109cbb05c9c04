"""Options of a training run, named as in Diffusers' training scripts where they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

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
        use_8bit_adam: keep AdamW's moments in 8 bits (bitsandbytes).
        ema_decay: keep an exponential moving average of the student's trained weights, and sample and export it.
        mixed_precision: no, fp16 or bf16; Accelerate's own setting by default.
        parallel: what several processes hold: ddp, all of each network, or fsdp, a share of each weight, gradient and moment
            of a full student (with mixed_precision add gradient_checkpointing, or backward needs a half-precision copy of
            all weights at once).
        seed: of everything that is random.
        deterministic: deterministic kernels, for bitwise resume on CUDA.
        checkpointing_steps: a checkpoint every so many steps (and one at the end).
        checkpoints_total_limit: how many are kept, never fewer than 2.
        resume_from_checkpoint: "latest", a step or a checkpoint's folder; continues the run in output_dir.
        resume_strict: a damaged newest checkpoint is an error, instead of going back to the one before.
        on_nonfinite: what a NaN or infinite loss or gradient does: raise ends the run before the step; skip leaves out the
            phase's step, the step's EMA and the method's after_step, and gives up after 50 such steps in a row.
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
    use_8bit_adam: bool = False
    ema_decay: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    deterministic: bool = False
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    resume_strict: bool = False
    on_nonfinite: Literal["raise", "skip"] = "raise"
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
        if self.use_8bit_adam and self.parallel == "fsdp":
            raise InputError(
                "expected moments in 32 bits with --train.parallel fsdp, which cuts them by rows where 8-bit ones are packed "
                "in blocks; drop --train.use_8bit_adam (each process keeps only its share) or use --train.parallel ddp"
            )
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise InputError(
                f"expected checkpoints_total_limit >= 1, got {self.checkpoints_total_limit}; "
                "fix --train.checkpoints_total_limit (2 are always kept)"
            )


Flat = dict[str, bool | int | float | str]

FREE = (
    "output_dir", "export.*", "eval.*", "data.cache_dir", "data.encode_batch_size", "teacher.path",
    "train.resume_from_checkpoint", "train.resume_strict", "train.checkpointing_steps", "train.checkpoints_total_limit",
    "train.validation_*", "train.report_to", "train.max_train_steps", "train.train_batch_size",
    "train.gradient_accumulation_steps", "train.gradient_checkpointing", "train.on_nonfinite",
)  # fmt: skip
FIXED = ("train.seed", "train.ema_decay", "train.use_8bit_adam")  # of the options of train, which may change otherwise


def flat_config(config: Mapping[str, Any], prefix: str = "") -> Flat:
    """A nested configuration as dotted names and plain values: TensorBoard raises on None and on lists."""
    flat: Flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flat_config(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def flat_yaml(text: str) -> Flat:
    """The same of a config.yaml; {} where it holds no mapping or is damaged."""
    import yaml  # type: ignore[import-untyped]

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    return flat_config(config) if isinstance(config, Mapping) else {}


def binding(config: Flat) -> Flat:
    """The part of a flat config that a resumed run is held to: all but what is free to change."""
    return {key: value for key, value in config.items() if not any(fnmatchcase(key, pattern) for pattern in FREE)}


def resumed_changes(saved: Mapping[str, Any], now: Mapping[str, Any], place: str) -> list[str]:
    """Judges the differences between the config saved in `place` and the one that is to go on; {} where one is not known.

    A run is a function of its config, so a resumed one can't become another run without anybody noticing:

    - Free to change, and not in the :func:`binding` part that is compared: where things lie (the teacher may have moved), what
      is exported and measured, when checkpoints and samples are made, how long it trains, and how the global batch is cut,
      whose size is checked on its own.
    - Said: the rest of `train`, such as the learning rate, which holds from the next step on; and options that one of the
      two does not know, having been written by another version.
    - Refused: all else, and of `train` the seed, the EMA's decay and the kind of moments.

    Returns:
        "key: old -> new" for what is to be said.

    Raises:
        InputError: lists in the same way what can't change.
    """
    told: list[str] = []
    refused: list[str] = []
    for key in sorted(saved.keys() | now.keys()) if saved and now else ():
        if key in saved and key in now and saved[key] == now[key]:
            continue
        line = f"{key}: {saved.get(key, '(unknown)')} -> {now.get(key, '(unknown)')}"
        known = key in saved and key in now
        changeable = not known or (key.startswith("train.") and key not in FIXED)
        (told if changeable else refused).append(line)
    if refused:
        raise InputError(
            f"expected the config of {place}, got changes ({', '.join(refused)}); set them back, or start anew with another "
            "--output_dir"
        )
    return told
