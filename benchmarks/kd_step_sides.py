"""The two sides of benchmarks/kd_step.py: steps of our methods, and the calls of networks that none can do without."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from kd_step_setting import Setting
from torch import Tensor, nn

from stepdistill.kd.distilbert import DistilBERT, DistilBERTConfig
from stepdistill.kd.distillm import DistiLLM, DistiLLMConfig
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.gkd import GKD, GKDConfig
from stepdistill.kd.hinton import Hinton, HintonConfig
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig
from stepdistill.kd.minillm import MiniLLM, MiniLLMConfig
from stepdistill.kd.networks import TransformersNetwork
from stepdistill.kd.tinybert import TinyBERTConfig, TinyBERTLayers, TinyBERTPrediction, projection
from stepdistill.method import Method
from stepdistill.randomness import StepRandom

LEARNING_RATE = 1e-4
NEVER = 10**9  # steps between DistiLLM's validations, which are no part of a step
Seen = dict[str, list[list[int]]]  # the shapes of what student and teacher were given, call by call


class Ours:
    """A method's steps: batch, loss, backward, AdamW, what comes after a step."""

    def __init__(self, method: Any, data: Any, size: int, seed: int) -> None:
        self.method, self.data, self.size, self.seed = method, data, size, seed
        self.optimizer = adamw(p for network in method.networks().values() for p in network.trainable())
        self.models = {"student": method.student.module, "teacher": _teacher(method).module}

    def step(self, number: int) -> float:
        """CPU seconds of step `number`."""
        began = time.process_time()
        self.method.step = number
        chosen = [(number * self.size + i) % len(self.data) for i in range(self.size)]
        batch = self.data.batch(chosen, StepRandom(self.seed, number, range(self.size)))
        self.method.training_step(batch).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step()
        return time.process_time() - began


def _teacher(method: Any) -> TransformersNetwork:
    found: TransformersNetwork = method.signal.teacher if isinstance(method, LanguageModelKD) else method.teacher
    return found


@dataclass
class Bare:
    """The calls of stock networks alone.

    Attributes:
        student, teacher: of Transformers.
        given: what a forward is given.
        read: of the student's output, what a loss would see.
        forward: further arguments of a forward.
        new: tokens written after `given`'s prompts first; 0 for none.
        mixed: whether the teacher writes along.
        more: what trains beside the student.
    """

    student: Any
    teacher: Any
    given: dict[str, Tensor]
    read: Callable[[Any], Sequence[Tensor]]
    forward: dict[str, Any] = field(default_factory=dict)
    new: int = 0
    mixed: bool = False
    more: nn.Module | None = None

    def __post_init__(self) -> None:
        modules = [self.student] if self.more is None else [self.student, self.more]
        self.optimizer = adamw(p for module in modules for p in module.parameters() if p.requires_grad)
        self.models = {"student": self.student, "teacher": self.teacher}
        with torch.no_grad():
            outputs = self.read(self.student(**self._text(), **self.forward))
        numbers = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(o.shape, generator=numbers) / o.numel() for o in outputs]

    def step(self, number: int) -> float:
        """CPU seconds of a step; all are of the same work."""
        began = time.process_time()
        given = self._text()
        with torch.no_grad():
            self.teacher(**given, **self.forward)
        outputs = self.read(self.student(**given, **self.forward))
        torch.autograd.backward(outputs, self.gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - began

    @torch.no_grad()
    def _text(self) -> dict[str, Tensor]:
        """What both read: as given, or with the student's likeliest token after it, `new` times."""
        if not self.new:
            return self.given
        ids = unseen = self.given["input_ids"]
        writers = [self.student, self.teacher] if self.mixed else [self.student]
        caches: list[Any] = [None] * len(writers)
        for _ in range(self.new):
            found = [
                writer(input_ids=unseen, past_key_values=cache, use_cache=True, logits_to_keep=1)
                for writer, cache in zip(writers, caches, strict=True)
            ]
            caches = [f.past_key_values for f in found]
            unseen = found[0].logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, unseen], 1)
        return {"input_ids": ids}


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.AdamW:
    """Of both sides."""
    return torch.optim.AdamW(list(parameters), lr=LEARNING_RATE)


@contextmanager
def watched(models: dict[str, Any]) -> Iterator[Seen]:
    """Within it the shapes of what the models' bodies are given are kept."""
    seen: Seen = {name: [] for name in models}

    def keep(name: str) -> Callable[..., None]:
        def hook(_body: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found = args[0] if args else named.get("input_ids", named.get("pixel_values"))
            seen[name].append(list(found.shape))

        return hook

    with ExitStack() as stack:
        for name, model in models.items():
            handle = model.base_model.register_forward_pre_hook(keep(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


@dataclass(frozen=True)
class Case:
    """A method in one of its kinds of steps.

    Attributes:
        recipe: its name.
        what: the kind of step, "" where there is but one.
        method: (the method, its data) in a setting.
        bare: its calls in a setting.
    """

    recipe: str
    what: str
    method: Callable[[Setting], tuple[Method, Any]]
    bare: Callable[[Setting], Bare]

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.recipe}, {self.what}" if self.what else self.recipe

    def sides(self, setting: Setting) -> tuple[Ours, Bare]:
        """Both, each with networks of its own and the same weights."""
        method, data = self.method(setting)
        size = setting.images if self.recipe == "hinton" else setting.batch
        return Ours(method, data, size, setting.seed), self.bare(setting)


def _logits(output: Any) -> list[Tensor]:
    return [output.logits]


def _states(output: Any) -> list[Tensor]:
    return [output.logits, output.hidden_states[-1]]


def _text(setting: Setting, tokens: int, new: int = 0, mixed: bool = False) -> Bare:
    """Calls on given text, or on what is written after given prompts."""
    student, teacher = setting.causal()
    for lm in (student, teacher):  # or Transformers looks for padding in what comes without a mask
        lm.config.pad_token_id = None
    given = {"input_ids": setting.ids(tokens)[: setting.batch]}
    return Bare(student.module, teacher.module, given, _logits, {"use_cache": False}, new, mixed)


def _given(setting: Setting) -> Bare:
    return _text(setting, setting.block)


def _replayed(setting: Setting) -> Bare:
    return _text(setting, setting.prompt + setting.new)


def _written(setting: Setting, mixed: bool = False) -> Bare:
    return _text(setting, setting.prompt, setting.new, mixed)


def _lm_kd(setting: Setting) -> tuple[Method, Any]:
    return LanguageModelKD(LanguageModelKDConfig(Divergence("forward_kl")), *setting.causal()), setting.texts()


def _gkd(setting: Setting, lmbda: float) -> tuple[Method, Any]:
    data = setting.prompts() if lmbda else setting.texts()
    return GKD(GKDConfig(lmbda, max_new_tokens=setting.new), *setting.causal(), data, setting.end), data


def _distillm(setting: Setting, threshold: float, capacity: int = NEVER, steps: int = NEVER) -> tuple[Method, Any]:
    """The student writes while the buffer is not full; with one step in all nothing is written anew that need not be."""
    data = setting.prompts() if threshold else setting.texts()
    config = DistiLLMConfig(
        threshold=threshold, validate_every=NEVER, validation_rows=1, capacity=capacity, max_new_tokens=setting.new
    )
    return DistiLLM(config, *setting.causal(), data, data, setting.end, steps), data


def _replaying(setting: Setting) -> tuple[Method, Any]:
    return _distillm(setting, 1.0, setting.batch, 1)


def _minillm(setting: Setting) -> tuple[Method, Any]:
    data = setting.prompts()
    return MiniLLM(MiniLLMConfig(max_new_tokens=setting.new), *setting.causal(), data, setting.end), data


def _distilbert(setting: Setting) -> tuple[Method, Any]:
    data = setting.masked_texts()
    return DistilBERT(DistilBERTConfig(), *setting.masked(), data.share), data


def _masked(setting: Setting) -> Bare:
    student, teacher = setting.masked()
    given = {"input_ids": setting.ids(setting.block)[: setting.batch]}
    return Bare(student.module, teacher.module, given, _states, {"output_hidden_states": True})


def _tinybert_layers(setting: Setting, attention: float) -> tuple[Method, Any]:
    student, teacher = setting.text_classifiers()
    config, shared = TinyBERTConfig(attention_weight=attention), projection(student, teacher, setting.seed)
    return TinyBERTLayers(config, student, teacher, shared), setting.labelled_texts()


def _layers(setting: Setting) -> Bare:
    """W_e and W_h of equations 8 and 9 are among the networks: what is read are their products."""
    student, teacher = setting.text_classifiers()
    student, more = student.layers_only(), projection(student, teacher, setting.seed).module
    given = {"input_ids": setting.ids(setting.block)[: setting.batch]}
    models = (student.module, teacher.module)
    return Bare(*models, given, lambda found: more(found.hidden_states), {"output_hidden_states": True}, more=more)


def _tinybert_prediction(setting: Setting) -> tuple[Method, Any]:
    return TinyBERTPrediction(TinyBERTConfig(), *setting.text_classifiers()), setting.labelled_texts()


def _answers(setting: Setting) -> Bare:
    student, teacher = setting.text_classifiers()
    return Bare(student.module, teacher.module, {"input_ids": setting.ids(setting.block)[: setting.batch]}, _logits)


def _hinton(setting: Setting) -> tuple[Method, Any]:
    return Hinton(HintonConfig(), *setting.image_classifiers()), setting.labelled_images()


def _images(setting: Setting) -> Bare:
    student, teacher = setting.image_classifiers()
    pixels = setting.labelled_images().pixels(range(setting.images))
    return Bare(student.module, teacher.module, {"pixel_values": pixels}, _logits)


CASES = (
    Case("lm_kd", "", _lm_kd, _given),
    Case("gkd", "data's text", partial(_gkd, lmbda=0.0), _given),
    Case("gkd", "own text", partial(_gkd, lmbda=1.0), _written),
    Case("distillm", "data's text", partial(_distillm, threshold=0.0), _given),
    Case("distillm", "own text", partial(_distillm, threshold=1.0), _written),
    Case("distillm", "replayed", _replaying, _replayed),
    Case("minillm", "", _minillm, partial(_written, mixed=True)),
    Case("distilbert", "", _distilbert, _masked),
    Case("tinybert", "layers", partial(_tinybert_layers, attention=1.0), _layers),
    Case("tinybert", "layers without attention", partial(_tinybert_layers, attention=0.0), _layers),
    Case("tinybert", "answers", _tinybert_prediction, _answers),
    Case("hinton", "", _hinton, _images),
)
