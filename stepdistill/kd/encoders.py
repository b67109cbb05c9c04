"""The encoders of a task's distillation: a pre-trained teacher, a fine-tuned one, and students of one tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.masked import Alphabet, MaskedRows, framed_blocks
from ..data.text import Example
from ..data.tokens import TokenRows
from ..errors import InputError
from ..networks.lora import StudentConfig
from .attention import Shape
from .layouts import bert_layout, rotary_layout, seeded
from .masked import MaskedLM, positions_of
from .networks import TransformersNetwork
from .pair import DEMO, MASKED, LMTeacherConfig, Pair
from .text_classifier import TextClassifier
from .vocabulary import check_same_tokens

FULL = StudentConfig(kind="full")
TUNED = "--stages.fine_tuned"
WIDTH = 64  # of a demo, about


@dataclass
class EncoderStudentConfig:
    """What trains: all of it.

    Attributes:
        path: a folder or hub id of a masked language model that students begin as, or "demo" for a small BERT layout with
            random weights (beside a demo's teacher, of that one's layout).
        revision: branch, tag or commit on the hub.
        layers: of the demo.
        width: of the demo; by default about 64, an even number for each of its heads.
        heads: of the demo; as many as the teacher's by default, as attention is aligned head with head.
    """

    path: str = DEMO
    revision: str | None = None
    layers: int = 2
    width: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise InputError(f"expected {name} >= 1, got {value}; fix --student.{name}")


@dataclass
class StagesConfig:
    """How long each stage is; that of the answers (2b) is --train.max_train_steps.

    Attributes:
        general: optimizer steps of stage 1, on general text; 0 for a student that has been through it.
        intermediate: of stage 2a, on the task.
        fine_tuning: of the teacher on the task's labels; none by default where `fine_tuned` names one that is.
        fine_tuned: a folder or hub id of the teacher fine-tuned on this task, a text classifier of these classes.
    """

    general: int = 400
    intermediate: int = 200
    fine_tuning: int | None = None
    fine_tuned: str | None = None

    def __post_init__(self) -> None:
        for name in ("general", "intermediate", "fine_tuning"):
            if (value := vars(self)[name]) is not None and value < 0:
                raise InputError(f"expected {name} >= 0, got {value}; fix --stages.{name}")
        if self.tuning == 0 and self.fine_tuned is None:
            raise InputError(
                f"expected a teacher that knows the task, got one without a step of it; give {TUNED} or --stages.fine_tuning"
            )

    @property
    def tuning(self) -> int:
        """Steps of the teacher on the task."""
        return (300 if self.fine_tuned is None else 0) if self.fine_tuning is None else self.fine_tuning


class Encoders:
    """All networks of a run over one tokenizer.

    Args:
        teacher, student: which.
        fine_tuned: the path of a teacher that knows the task, or None.
        examples: texts that a demo's tokenizer is trained on.
        vocabulary: of that tokenizer.
        window: positions of networks that are laid out anew; others are to have as many.
        classes: of the task.
        seed: of weights.
        device: where they go.
        known: the tokenizer of all, where it is known; found or trained by default.

    Attributes:
        tokenizer: of all.
    """

    def __init__(
        self, teacher: LMTeacherConfig, student: EncoderStudentConfig, fine_tuned: str | None, examples: Sequence[Example],
        vocabulary: int, window: int, classes: Sequence[str], seed: int, device: torch.device,
        known: Any = None,
    ) -> None:  # fmt: skip
        self.pair = Pair(MASKED, teacher, None, examples, vocabulary, window, seed, device, tokenizer=known)
        self.student_config, self.fine_tuned, self.classes = student, fine_tuned, tuple(classes)
        self.tokenizer = self.pair.tokenizer
        self._tuned = None if fine_tuned is None else self._open_tuned(fine_tuned)  # now, before anything trains

    def general(self, examples: Sequence[Example], size: int) -> tuple[TokenRows, MaskedRows]:
        """Blocks of `size` tokens of general text: whole, for the student's layers, and with words masked, to be guessed."""
        blocks = framed_blocks(examples, self.tokenizer, size)
        return TokenRows(blocks, int(self.tokenizer.pad_token_id)), MaskedRows(blocks, Alphabet.of(self.tokenizer))

    def teacher(self) -> MaskedLM:
        """The pre-trained teacher, in train mode. InputError where the fine-tuned one has other layers."""
        teacher = self.pair.teacher(trains=True)
        if self._tuned is not None and (found := Shape.of(self._tuned)) != (wanted := Shape.of(teacher)):
            raise InputError(
                f"expected the fine-tuned teacher to be of the pre-trained one's shape, got {found} for {wanted}; fix {TUNED} "
                "or --teacher.path"
            )
        return teacher

    def tuned(self, teacher: MaskedLM) -> TextClassifier:
        """The teacher of the task, in train mode: the one named, or the pre-trained one's layers with a new head."""
        return self.classifier(teacher) if self._tuned is None else self._tuned

    def _open_tuned(self, path: str) -> TextClassifier:
        model = self._opened("AutoModelForSequenceClassification", path, TUNED)
        self._take_classes(model)
        return TextClassifier(model).student(FULL)

    def student(self, heads: int) -> MaskedLM:
        """A student with the head of a masked language model, in train mode: the same weights each time.

        Args:
            heads: of the teacher.
        """
        config, pair = self.student_config, self.pair
        if config.path == DEMO:
            count = config.heads or heads
            width = config.width or 2 * count * max(1, round(WIDTH / (2 * count)))
            if width % count:
                raise InputError(
                    f"expected a width that {count} heads divide, got {width}; fix --student.width or --student.heads"
                )
            lay = rotary_layout if pair.teacher_config.path == DEMO else bert_layout
            model = lay(config.layers, width, pair.tokenizer, pair.window, pair.seed + 1, count)
            model = model.to(pair.device)
        else:
            model = self._opened("AutoModelForMaskedLM", config.path, "--student.path", config.revision)
        return MaskedLM(model).student(FULL)

    def classifier(self, encoder: TransformersNetwork) -> TextClassifier:
        """A classifier of the task with the layers of `encoder`, copied, and a new pooler and head, in train mode."""
        from transformers import AutoModelForSequenceClassification

        source: Any = encoder.module
        config = copy.deepcopy(source.config)
        config.id2label, config.label2id = self._names()
        model: Any = seeded(
            self.pair.seed, lambda: AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        )
        missing, left = model.base_model.load_state_dict(source.base_model.state_dict(), strict=False)
        if odd := [*left, *(name for name in missing if not name.startswith("pooler."))]:
            raise InputError(
                f"expected a classifier with the layers of {type(source).__name__}, got one with others, first {odd[0]}; give "
                "a model in a BERT layout (--teacher.path, --student.path)"
            )
        return TextClassifier(model.to(self.pair.device)).student(FULL)

    def _names(self) -> tuple[dict[int, str], dict[str, int]]:
        return dict(enumerate(self.classes)), {name: i for i, name in enumerate(self.classes)}

    def _opened(self, auto: str, path: str, flag: str, revision: str | None = None) -> Any:
        """A checkpoint that cuts texts as the teacher does and has positions for them."""
        from ..networks.pretrained import load_model, load_tokenizer

        check_same_tokens(load_tokenizer(path, flag, revision), self.tokenizer, flag)
        model = load_model(auto, path, flag, revision).to(self.pair.device)
        positions = positions_of(model)
        if positions is not None and positions < self.pair.window:
            raise InputError(
                f"expected texts that fit in the {positions} positions of {path!r}, got {self.pair.window} tokens; lower "
                "--data.block_size or --task.length"
            )
        return model

    def _take_classes(self, model: Any) -> None:
        """Names of the task's classes, where the checkpoint has as many without names; InputError for others."""
        found = [str(model.config.id2label[i]) for i in sorted(model.config.id2label)]
        numbered = [f"LABEL_{i}" for i in range(len(self.classes))]
        if found not in (numbered, list(self.classes)):
            raise InputError(
                f"expected the {len(self.classes)} classes of the task ({', '.join(self.classes[:3])}, ...) in "
                f"{self.fine_tuned!r}, got {len(found)} ({', '.join(found[:3])}, ...); fix {TUNED}"
            )
        model.config.id2label, model.config.label2id = self._names()
