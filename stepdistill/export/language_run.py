"""What runs of causal language models open and close with: the text, the two models, what they are measured on, the files.

The fits between, what is trained on what and when, are the recipe's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

from ..data.text import TextConfig, open_texts
from ..data.tokens import TokenRows, end_of_text, rows_of
from ..kd.evaluation import EvalConfig, Examination, own_text_divergence
from ..kd.networks import CausalLM
from ..kd.pair import CAUSAL, LMStudentConfig, LMTeacherConfig, Pair
from ..training.config import TrainConfig
from ..training.trainer import Trainer
from .config import NetworkExportConfig
from .hub import check_hub
from .language_model import finish, writer
from .transformer import weights_hash


class LanguageOptions(Protocol):
    """The sections that a recipe for causal language models has beside its method."""

    teacher: LMTeacherConfig
    student: LMStudentConfig
    data: TextConfig
    train: TrainConfig
    export: NetworkExportConfig
    eval: EvalConfig
    vocabulary: int
    output_dir: str


class LanguageRun:
    """Text and models of one run.

    Args:
        options: the recipe's.
        trainer: of the run.

    Attributes:
        pair: teacher and student over one tokenizer.
        exam: the held-out text that all models are measured on.

    Raises InputError for text, checkpoints and an upload that can't be had.
    """

    def __init__(self, options: LanguageOptions, trainer: Trainer) -> None:
        self.options, self.trainer, train = options, trainer, options.train
        check_hub(options.export, options.output_dir)
        self._texts, window = open_texts(options.data), options.data.block_size
        place = trainer.device, trainer.weight_dtype
        self.pair: Pair[CausalLM] = Pair(
            CAUSAL, options.teacher, options.student, self._texts.train, options.vocabulary, window, train.seed, *place
        )
        held_out, tokenizer = self._texts.held_out, self.pair.tokenizer
        self.exam = Examination.of(held_out, tokenizer, window, options.eval, train.validation_prompts)

    @cached_property
    def text(self) -> TokenRows:
        """The text to train on. InputError where there are prompts alone, of which nothing is learned."""
        return rows_of(self._texts.train, self.pair.tokenizer, self.options.data.block_size)

    def prompted(self) -> tuple[TokenRows, TokenRows]:
        """The text to train on and the held-out one, with prompts that a student completes itself."""
        data, tokenizer = self.options.data, self.pair.tokenizer
        train, held_out = (
            rows_of(examples, tokenizer, data.block_size, data.prompt)
            for examples in (self._texts.train, self._texts.held_out)
        )
        return train, held_out

    @property
    def end(self) -> int:
        """The end-of-text token."""
        return end_of_text(self.pair.tokenizer)

    def student(self) -> CausalLM:
        """A student, in train mode: the same weights each time, so that a control group begins where it does."""
        return self.pair.student(self.options.train.gradient_checkpointing)

    def teacher(self, steps: int = 0) -> CausalLM:
        """The teacher: to be trained for `steps` first, or ready, and then the run goes on with this one alone."""
        teacher = self.pair.teacher(trains=steps > 0)
        if not steps:
            self.trainer.teacher = weights_hash(teacher)
        return teacher

    def writer(self, student: CausalLM) -> Callable[[int], None]:
        """What `Trainer.fit` calls at validation: the student's continuations go to samples/STEP.txt."""
        return writer(self.exam, student, self.options.output_dir)

    def own_text(
        self, students: Mapping[str, CausalLM], teacher: CausalLM, judged: TokenRows, new: int
    ) -> dict[str, float]:
        """How far each is from the teacher on what it writes itself, up to `new` tokens after prompts of `judged`."""
        return {name: own_text_divergence(lm, teacher, judged, new, self.end) for name, lm in students.items()}

    def finish(self, method: str, models: Mapping[str, CausalLM], **measured: Mapping[str, float]) -> dict[str, Any]:
        """:func:`.language_model.finish` in the run folder; `measured` is its `before` and `own_text`."""
        folder, export, teacher = self.options.output_dir, self.options.export, self.options.eval.teacher
        measured_ones = {name: lm for name, lm in models.items() if name != "teacher" or teacher}
        return finish(folder, method, self.pair, self.exam, measured_ones, **measured, export=export)
