"""A teacher and a student of one tokenizer: opened from checkpoints, or laid out anew. Recipes read the options first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from ..data.text import Example, TextConfig
from ..data.tokens import TokenRows
from ..errors import InputError
from ..networks.lora import StudentConfig
from .layouts import gpt2_layout, rotary_layout, train_masked_tokenizer, train_tokenizer
from .masked import MaskedLM
from .networks import CausalLM, LanguageModel
from .teacher_cache import CachedRows, Key
from .vocabulary import check_same_tokens

DEMO = "demo"
M = TypeVar("M", bound=LanguageModel)


@dataclass
class LMTeacherConfig:
    """Whom to learn from.

    Attributes:
        path: a folder or hub id of a language model, or "demo" for a small layout (of GPT-2 or BERT) that is trained first.
        revision: branch, tag or commit on the hub.
        fit_steps: optimizer steps on the same text before it teaches; by default none for checkpoints, twice the
            student's for a demo.
        layers: of the demo.
        width: of the demo.
        cache: a folder of `stepdistill cache-logits`, which answers in training in the place of the checkpoint at `path`.
    """

    path: str = DEMO
    revision: str | None = None
    fit_steps: int | None = None
    layers: int = 4
    width: int = 128
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and (self.path == DEMO or self.fit_steps):
            raise InputError(
                f"expected a finished teacher with a cache of its answers, got {self.path!r}, which is trained in the run; "
                "give --teacher.path the checkpoint that was cached and no --teacher.fit_steps, or drop --teacher.cache"
            )
        if self.fit_steps is not None and self.fit_steps < 0:
            raise InputError(f"expected fit_steps >= 0, got {self.fit_steps}; fix --teacher.fit_steps")
        _check_layout("teacher", self.layers, self.width)

    def steps(self, train: int) -> int:
        """Optimizer steps before it teaches; `train` is how many the student has."""
        if self.fit_steps is not None:
            return self.fit_steps
        return 2 * train if self.path == DEMO else 0


@dataclass
class LMStudentConfig:
    """What trains.

    Attributes:
        path: a folder or hub id of a language model, or "demo" for a small layout (of GPT-2 or BERT) with random weights.
        revision: branch, tag or commit on the hub.
        kind: "full", all its weights, or "lora", an adapter on them, which is merged into them at the end.
        rank: the adapter's inner dimension.
        alpha: its strength is alpha / rank; the rank by default.
        layers: of the demo.
        width: of the demo.
    """

    path: str = DEMO
    revision: str | None = None
    kind: Literal["full", "lora"] = "full"
    rank: int = 64
    alpha: float | None = None
    layers: int = 2
    width: int = 64

    def __post_init__(self) -> None:
        if self.kind not in ("full", "lora"):
            raise InputError(f"expected full or lora, got {self.kind!r}; fix --student.kind")
        if self.kind == "lora" and self.path == DEMO:
            raise InputError(
                "expected a checkpoint for an adapter, got random weights; give --student.path, or --student.kind full"
            )
        self.trained()
        _check_layout("student", self.layers, self.width)

    def trained(self) -> StudentConfig:
        """What of the network trains."""
        return StudentConfig(self.kind, self.rank, self.alpha)


def _check_layout(whose: str, layers: int, width: int) -> None:
    for name, value in (("layers", layers), ("width", width)):
        if value < 1:
            raise InputError(f"expected {name} >= 1, got {value}; fix --{whose}.{name}")


@dataclass(frozen=True)
class Kind(Generic[M]):
    """A kind of language models.

    Attributes:
        auto: the class of Transformers that opens one.
        network: what it becomes here.
        layout: (layers, width, tokenizer, window, seed) -> a model with random weights.
        tokenizer: (texts, size, window) -> a tokenizer for such a layout.
    """

    auto: str
    network: Callable[[Any], M]
    layout: Callable[[int, int, Any, int, int], Any]
    tokenizer: Callable[[Sequence[Example], int, int], Any]


CAUSAL: Kind[CausalLM] = Kind("AutoModelForCausalLM", CausalLM, gpt2_layout, train_tokenizer)
MASKED: Kind[MaskedLM] = Kind("AutoModelForMaskedLM", MaskedLM, rotary_layout, train_masked_tokenizer)


class Pair(Generic[M]):
    """Teacher and student over one tokenizer.

    Args:
        kind: CAUSAL or MASKED.
        teacher, student: which; a student that is made of its teacher is None.
        examples: texts that a tokenizer is trained on, where neither of the two brings one.
        vocabulary: of that tokenizer.
        window: positions of networks that are laid out anew.
        seed: of their weights.
        device: where they go.
        dtype: of a frozen teacher's weights.
        tokenizer: theirs, where it is known; found or trained by default.

    Attributes:
        tokenizer: of both.

    Raises InputError for checkpoints that can't be opened or that cut texts differently.
    """

    def __init__(
        self, kind: Kind[M], teacher: LMTeacherConfig, student: LMStudentConfig | None, examples: Sequence[Example],
        vocabulary: int, window: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
    ) -> None:  # fmt: skip
        self.kind, self.teacher_config, self.student_config = kind, teacher, student
        self.window, self.seed, self.device, self.dtype = window, seed, device, dtype
        self.tokenizer = self._tokenizer(examples, vocabulary) if tokenizer is None else tokenizer

    def _tokenizer(self, examples: Sequence[Example], vocabulary: int) -> Any:
        from ..networks.pretrained import load_tokenizer

        places = ((self.teacher_config, "--teacher.path"), (self.student_config, "--student.path"))
        found = [
            load_tokenizer(config.path, flag, config.revision)
            for config, flag in places
            if config is not None and config.path != DEMO
        ]
        if len(found) == 2:
            check_same_tokens(found[1], found[0])
        return found[0] if found else self.kind.tokenizer(examples, vocabulary, self.window)

    def teacher(self, trains: bool = False) -> M:
        """The teacher, opened: with weights that are to be trained first, in float32, or frozen.

        InputError where a cache is to stand for it, of which only methods on given text know.
        """
        if self.teacher_config.cache is not None:
            raise InputError(
                "expected the teacher itself, got a cache of its answers to one text; this method asks it about others: drop "
                "--teacher.cache, or use recipes/lm_kd.py"
            )
        return self.live_teacher(trains)

    def cached(self, rows: TokenRows, text: TextConfig) -> CachedRows:
        """The rows with the teacher's answers from its cache; `text` says where the rows came from."""
        if (folder := self.teacher_config.cache) is None:
            raise ValueError("expected --teacher.cache, got none")
        return CachedRows(folder, rows, key_of(self.teacher_config, rows, self.tokenizer, text))

    def live_teacher(self, trains: bool = False) -> M:
        """The teacher, opened, also where a cache stands for it in training: to be measured."""
        dtype = torch.float32 if trains else self.dtype
        teacher = self._network(self.teacher_config, "--teacher.path", self.seed, dtype)
        return teacher.student(StudentConfig(kind="full")) if trains else teacher.frozen()

    def student(self, recompute: bool = False) -> M:
        """A student, opened: the same weights each time. `recompute`: activations are computed again in backward.

        ValueError for one that is made of its teacher.
        """
        config = self.student_config
        if config is None:
            raise ValueError("expected a student of its own, got one that is made of its teacher")
        network = self._network(config, "--student.path", self.seed + 1, torch.float32)
        student = network.student(config.trained(), self.seed)
        student.checkpoint_activations(recompute)
        return student

    def _network(self, config: LMTeacherConfig | LMStudentConfig, flag: str, seed: int, dtype: torch.dtype) -> M:
        from ..networks.pretrained import load_model

        if config.path == DEMO:
            model = self.kind.layout(config.layers, config.width, self.tokenizer, self.window, seed)
        else:
            model = load_model(self.kind.auto, config.path, flag, config.revision, dtype)
        network = self.kind.network(model.to(self.device))
        check_window(network, config.path, self.window)
        return network


def check_window(network: LanguageModel, path: str, window: int) -> None:
    """InputError for a model without so many positions."""
    if network.window is not None and network.window < window:
        raise InputError(
            f"expected blocks that fit in the {network.window} positions of {path!r}, got {window} tokens; lower "
            "--data.block_size"
        )


def key_of(teacher: LMTeacherConfig, rows: TokenRows, tokenizer: Any, text: TextConfig) -> Key:
    """What a cache of this teacher's answers to these rows is known by; reads the checkpoint's files, opens no model."""
    from ..networks.pretrained import checkpoint_hash

    found = checkpoint_hash(teacher.path, "--teacher.path", teacher.revision)
    facts = {"path": teacher.path, "revision": teacher.revision, "sha256": found}
    source = {
        name: vars(text)[name] for name in ("path", "split", "config_name", "text_column", "block_size", "held_out")
    }
    return Key.of(facts, rows, tokenizer, source)
