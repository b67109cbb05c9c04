"""What benchmarks/gkd_step.py compares: steps of GKD (arXiv 2306.13649) in our Trainer's loop and in TRL's GKDTrainer.

Both train the same GPT-2 layout from the same weights towards the same teacher, on the same rows in the same order. A step is
all that happens between one and the next: batch, what the student writes, both forwards, backward, clipping, AdamW, metrics.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from kd_step_setting import word_tokenizer

from stepdistill.batch import Batch
from stepdistill.data.order import indices
from stepdistill.data.tokens import Row, TokenRows
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.gkd import GKD, GKDConfig
from stepdistill.kd.layouts import gpt2_layout
from stepdistill.kd.networks import CausalLM
from stepdistill.method import Losses, Method
from stepdistill.networks.lora import StudentConfig
from stepdistill.networks.network import Network
from stepdistill.training.config import TrainConfig

TEACHER, STUDENT = (4, 128), (2, 64)  # layers and width
SAMPLES = 64
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """A pair, text, and what is asked of a step.

    Attributes:
        vocabulary: entries of both heads.
        lmbda: 1 where the student writes each batch, 0 where none.
        batch: rows a step.
        prompt, new: tokens of each prompt, and after it, the data's or the student's.
        beta: of the JSD.
        seed: of weights, rows, their order and what is written.
    """

    vocabulary: int
    lmbda: float
    batch: int
    prompt: int
    new: int
    beta: float
    seed: int

    @property
    def end(self) -> int:
        """The end-of-text token: one that no model writes, so that both sides always write `new` tokens."""
        return self.vocabulary

    def tokenizer(self) -> Any:
        """Of the vocabulary."""
        return word_tokenizer(self.vocabulary)

    def models(self, tokenizer: Any) -> tuple[Any, Any]:
        """(student, teacher), new ones with the same weights each time."""
        window = self.prompt + self.new
        return (
            gpt2_layout(*STUDENT, tokenizer, window, self.seed),
            gpt2_layout(*TEACHER, tokenizer, window, self.seed + 1),
        )

    def rows(self) -> TokenRows:
        """Random tokens; the first are the prompt, the others count."""
        numbers = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(self.vocabulary - 1, (SAMPLES, self.prompt + self.new), generator=numbers)
        learned = (False,) * self.prompt + (True,) * self.new
        return TokenRows([Row(tuple(row), learned, self.prompt) for row in ids.tolist()], self.vocabulary - 1)

    def in_order(self, steps: int) -> list[dict[str, list[int]]]:
        """Prompt and completion of each row of each step, in the order in which our loop takes them."""
        rows = self.rows().rows
        chosen = [i for step in range(steps) for i in indices(self.seed, step, range(self.batch), self.batch, SAMPLES)]
        return [{"prompt": list(rows[i].ids[: self.prompt]), "ids": list(rows[i].ids)} for i in chosen]


@dataclass
class Found:
    """Of each step of a side: CPU seconds, the loss, and over how many tokens it is the mean."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Noted(Method):
    """Trains as `method` does, and notes its losses."""

    def __init__(self, method: Method, found: Found) -> None:
        self.method, self.found = method, found

    def networks(self) -> dict[str, Network]:
        return self.method.networks()

    def training_step(self, batch: Batch) -> Losses:
        losses = self.method.training_step(batch)
        self.found.losses.append(float(losses.total.detach()))
        self.found.tokens.append(int(losses.count))
        return losses


def gkd(setting: Setting) -> GKD:
    """Our method."""
    student, teacher = setting.models(setting.tokenizer())
    config = GKDConfig(setting.lmbda, max_new_tokens=setting.new, divergence=Divergence("jsd", setting.beta))
    pupil = CausalLM(student).student(StudentConfig(kind="full"))
    return GKD(config, pupil, CausalLM(teacher).frozen(), setting.rows(), setting.end)


def ours(setting: Setting, steps: int, found: Found) -> Iterator[None]:
    """Steps of our loop, one for each `next`."""
    from stepdistill.training.loop import Fit
    from stepdistill.training.trackers import Progress
    from stepdistill.training.trainer import Trainer

    config = TrainConfig(
        max_train_steps=steps, train_batch_size=setting.batch, learning_rate=LEARNING_RATE, adam_weight_decay=0.0,
        checkpointing_steps=2 * steps, mixed_precision="no", seed=setting.seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, closing(Trainer(config, folder)) as trainer:
        fit = Fit(trainer, Noted(gkd(setting), found), setting.rows(), "", steps)
        fit.resume()
        fit.go_back()
        with closing(fit), fit.wrapped(), closing(Progress(steps)) as progress:
            for _ in range(steps):
                began = time.process_time()
                fit.step_and_tell(progress)
                fit.stop.agreed(fit.accelerator)
                found.seconds.append(time.process_time() - began)
                yield


def trl(setting: Setting, steps: int, found: Found, between: Callable[[], None]) -> None:
    """GKDTrainer.train, with `between()` after each step, which is left out of the next one's seconds."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.seconds.append(time.process_time() - self.began)
            between()
            self.began = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        trainer = gkd_trainer(setting, steps, folder)
        loss_of = trainer.compute_loss

        def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = loss_of(model, inputs, *args, **kwargs)
            found.losses.append(float(loss.detach()))
            found.tokens.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return loss

        trainer.compute_loss = noted
        trainer.add_callback(Turns())
        trainer.train()


def gkd_trainer(setting: Setting, steps: int, folder: str) -> Any:
    """TRL's, with the settings that ours has: no recomputation, float32, sampling at temperature 1, the same AdamW."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = setting.tokenizer()
    student, teacher = setting.models(tokenizer)
    options = GKDConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=setting.batch, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch", max_grad_norm=1.0, seed=setting.seed,
        gradient_checkpointing=False, bf16=False, use_cpu=not torch.accelerator.is_available(), save_strategy="no",
        report_to="none", train_sampling_strategy="sequential", dataloader_pin_memory=False, lmbda=setting.lmbda,
        beta=setting.beta, temperature=1.0, max_new_tokens=setting.new, max_length=setting.prompt + setting.new,
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=options, train_dataset=Dataset.from_list(setting.in_order(steps)),
        data_collator=collated, processing_class=tokenizer,
    )  # fmt: skip
    trainer.generation_config.eos_token_id = setting.end
    return trainer


def collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """What GKDTrainer's own collator makes of rows of one length, without tokenising them again in each step."""
    ids, prompts = (torch.tensor([row[name] for row in rows]) for name in ("ids", "prompt"))
    labels = ids.clone()
    labels[:, : prompts.shape[1]] = -100
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": prompts,
        "prompt_attention_mask": torch.ones_like(prompts),
    }  # fmt: skip


def turns(setting: Setting, steps: int) -> tuple[Found, Found]:
    """Our steps and TRL's, one of each in turns."""
    mine, theirs = Found(), Found()
    other = ours(setting, steps, mine)
    with closing(other):
        trl(setting, steps, theirs, lambda: next(other))
    return mine, theirs


def has_trl() -> bool:
    """Whether there is a side to compare with."""
    return find_spec("trl") is not None
