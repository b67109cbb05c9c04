"""Language models and classifiers of Transformers as networks: a student, full or an adapter, and a frozen teacher."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import InputError
from ..networks.lora import Adapters, StudentConfig
from ..networks.network import Network
from .head import Head, NotCalled

LOGIT_SCALES = ("logit_scale", "lm_head_multiplier")  # factors on the logits, by their names in configs
LOGIT_DIVISORS = ("logits_scaling",)
SOFT_CAP = "final_logit_softcapping"


class TransformersNetwork(Network):
    """What language models and classifiers share: adapters, modes, recomputed activations."""

    def student(self, config: StudentConfig, seed: int = 0) -> Self:
        """A student of these weights that trains an adapter on them, or all of them; in train mode.

        This object is used up: the student has its module.
        """
        student = copy.copy(self)
        if config.kind == "lora":
            student.adapters = Adapters(self.module)
            student.adapters.attach("student", config.spec(self.lora_targets()), seed)
            student.adapter = "student"
        else:
            self.module.float().requires_grad_(True)
        student._fix_trainable()
        student.module.train()
        return student

    @torch.no_grad()
    def copy_from(self, other: Network) -> Self:
        """Takes over what another student of the same checkpoint has learned."""
        theirs = other.state()
        for name, value in self.state().items():
            value.copy_(theirs[name])
        return self

    def frozen(self) -> Self:
        """This network as a teacher: in eval mode for good, nothing in it trains."""
        self.module.requires_grad_(False).eval()
        self._fix_trainable()
        return self

    def lora_targets(self) -> tuple[str, ...]:
        """Names of all linear layers but the head."""
        raise InputError(f"{type(self).__name__} has no layers that LoRA adapts by default; use --student.kind full")

    def checkpoint_activations(self, wanted: bool = True) -> None:
        """If `wanted`, activations are computed again in backward."""
        if wanted:
            module: Any = self.module
            with warnings.catch_warnings():  # the name that all versions of 5 have; the newer ones call it deprecated
                warnings.simplefilter("ignore", FutureWarning)
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in backward."""
        module: Any = self.module
        with warnings.catch_warnings():  # as above
            warnings.simplefilter("ignore", FutureWarning)
            return bool(module.is_gradient_checkpointing)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the module is in eval mode and nothing has a graph; afterwards its mode is as it was, module by module."""
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            # autocast of older torch keeps weights cast in here, without a graph, for the forward after it (pytorch #165068)
            torch.clear_autocast_cache()
            for part, training in modes:
                part.training = training


class LanguageModel(TransformersNetwork, ABC):
    """What causal and masked language models share: a body, and an output layer over a vocabulary.

    Attributes:
        explained: whether logits are :attr:`head` of :meth:`hidden`, found out by one forward.
        takes: names of the forward's arguments.
    """

    explained: bool

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        module: Any = net
        self.takes = frozenset(inspect.signature(net.forward).parameters)
        self.body = next((name for name, part in net.named_modules() if name and part is module.base_model), "")

    @abstractmethod
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, S, V] of tokens [B, S]; those at padding mean nothing."""

    @abstractmethod
    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads, [B, S, H]. Where :attr:`is_factored`."""

    @property
    @abstractmethod
    def window(self) -> int | None:
        """The most tokens that positions are there for; None where the config names no such number."""

    @property
    def is_factored(self) -> bool:
        """Whether a loss may go through the vocabulary in chunks; other heads, and shared-out ones, give their logits whole."""
        return self.explained and not self.is_shared_out

    @property
    def is_shared_out(self) -> bool:
        """Whether each process has some rows of the weights alone."""
        return isinstance(self.output_layer.weight, DTensor)

    @property
    def config(self) -> Any:
        """The model's config."""
        module: Any = self.module
        return module.config

    @property
    def vocabulary(self) -> int:
        """Entries of the logits; a table may be padded beyond the tokenizer's."""
        return int(self.output_layer.weight.shape[0])

    @property
    def output_layer(self) -> Any:
        """The module whose outputs are the logits."""
        module: Any = self.module
        return module.get_output_embeddings()

    @property
    def head(self) -> Head:
        """The output layer with its live weights, the input embeddings' own where they are tied, and the config's soft-cap."""
        layer = self.output_layer
        return Head(layer.weight, layer.bias, self.config.to_dict().get(SOFT_CAP))

    def tapped(self, name: str, output: Any) -> Any:
        # the last hidden state, of a ModelOutput as of a tuple
        return output if isinstance(output, Tensor) else output[0]

    def _head_explains_logits(self) -> bool:
        layer = self.output_layer
        if not isinstance(layer, nn.Linear):
            return False
        ids = torch.arange(4, device=layer.weight.device)[None] % self.vocabulary
        with self.evaluating():
            mask = torch.ones_like(ids)
            wanted = self(ids, mask).float()
            if wanted.shape[-1] != self.vocabulary:  # logits of another layer
                return False
            try:
                found = self.head.logits(self.hidden(ids, mask)).float()
            except NotCalled:
                return False
        return bool((found - wanted).abs().max() <= 1e-2 * wanted.abs().max().clamp(min=1e-6))

    def lora_targets(self) -> tuple[str, ...]:
        from transformers.pytorch_utils import Conv1D

        head = self.output_layer
        linear = [
            name
            for name, part in self.module.named_modules()
            if isinstance(part, (nn.Linear, Conv1D)) and part is not head
        ]
        return tuple(sorted(linear))


class CausalLM(LanguageModel):
    """A causal language model of Transformers.

    Positions count real tokens, so that padding on the left (or right) changes nothing; the same for student and teacher.

    Args:
        net: such as GPT2LMHeadModel.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        module: Any = net
        decoder = module.get_decoder()  # what OPT calls, past its base model
        bodies = dict.fromkeys([self.body, *(name for name, part in net.named_modules() if part is decoder)])
        self.explained = "logits_to_keep" in self.takes and any(map(self._explained_by, filter(None, bodies)))

    def _explained_by(self, body: str) -> bool:
        self.body = body
        return self._head_explains_logits()

    @property
    def window(self) -> int | None:
        found = self.config.to_dict().get("max_position_embeddings") or self.config.to_dict().get("n_positions")
        return None if found is None else int(found)

    @property
    def _scale(self) -> float:
        """Of the logits, by the config; on the hidden states here."""
        known = self.config.to_dict()
        factors = [known.get(name) or 1.0 for name in LOGIT_SCALES]
        return float(math.prod(factors) / math.prod(known.get(name) or 1.0 for name in LOGIT_DIVISORS))

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
        if "position_ids" in self.takes:
            given["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return given

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with self.active():
            logits: Tensor = self.net(**self._arguments(input_ids, attention_mask)).logits
        return logits

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads, [B, S, H], after the last norm, times the logits' scale. Where :attr:`is_factored`."""
        with self.active(), self.taps((self.body,)) as kept:
            # through net, so that DDP knows of it, and with the logits of one place, which cost next to nothing
            self.net(**self._arguments(input_ids, attention_mask), logits_to_keep=1)
        if (hidden := kept.get(self.body)) is None:
            raise NotCalled(f"expected a call of {self.body}, got none")
        found: Tensor = hidden if self._scale == 1.0 else hidden * self._scale
        return found

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """(logits [B, V] of the token after the last, the cache to go on with), to write in step with another model.

        Args:
            input_ids: [B, n], those that the cache has not seen.
            attention_mask: [B, S], of all tokens; positions are counted as everywhere here.
            cache: of the call before; None at first.
        """
        given = {**self._arguments(input_ids, attention_mask), "use_cache": True, "past_key_values": cache}
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"][:, -input_ids.shape[1] :]
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        with self.active():
            found = self.net(**given)
        return found.logits[:, -1], found.past_key_values


class Classifier(TransformersNetwork):
    """An image classifier of Transformers; it takes images in [-1, 1] and scales them as its processor would.

    Args:
        net: such as ResNetForImageClassification.
        mean, std: per channel, of pixels in [0, 1], as its processor has them; 0.5 each leaves [-1, 1] as it is.
    """

    def __init__(self, net: nn.Module, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)) -> None:
        super().__init__(net)
        self.mean, self.std = mean, std

    @property
    def classes(self) -> dict[int, str]:
        """Class number -> name."""
        module: Any = self.module
        return dict(module.config.id2label)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> logits [B, classes]."""
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        with self.active():
            logits: Tensor = self.net(pixel_values=((images + 1.0) / 2.0 - mean) / std).logits
        return logits


def sizes(networks: Mapping[str, Network]) -> dict[str, int]:
    """Parameters of each network, tied ones once."""
    return {name: sum(p.numel() for p in network.module.parameters()) for name, network in networks.items()}


def smaller_teacher(student: Network, teacher: Network) -> str:
    """What to say where the teacher is the smaller of the two; "" otherwise."""
    return told_sizes(**sizes({"student": student, "teacher": teacher}))


def told_sizes(student: int, teacher: int) -> str:
    """The same of numbers of parameters."""
    if teacher >= student:
        return ""
    return (
        f"the teacher ({teacher:,} parameters) is smaller than the student ({student:,}): are --teacher.path and "
        "--student.path the wrong way round?"
    )
