"""What an encoder of Transformers computes on its way: hidden states, and the attention scores BEFORE the softmax.

Transformers returns probabilities (`output_attentions`). A function registered with its AttentionInterface is handed queries
and keys instead: ours computes Q K^T * scaling from them and then does what `sdpa` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from torch import Tensor, nn

from ..errors import InputError
from ..networks.network import Network

NAME = "stepdistill_scores"  # of our function among Transformers' attention implementations


class Scores(Sequence[Tensor]):
    """The scores of layers, [B, h, S, S] each; every one is computed when it is asked for, and not kept."""

    def __init__(self) -> None:
        self._layers: list[Callable[[], Tensor]] = []

    def add(self, layer: Callable[[], Tensor]) -> None:
        """What computes the next layer's."""
        self._layers.append(layer)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return [layer() for layer in self._layers[index]] if isinstance(index, slice) else self._layers[index]()


# of a thread or task alone, so that scores never land in another's list
_KEPT: ContextVar[Scores | None] = ContextVar("attention scores", default=None)


def scores(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """A = Q K^T * scaling of [B, h, S, d] queries and keys -> [B, h, S, S] (arXiv 1909.10351, eq. 1).

    In the forward's precision, as in the authors' code: under autocast in bf16 they are rounded as queries and keys are before
    them, which decides the error: the gradient of scores in float32 would be as far off (docs/decisions.md).

    Args:
        scaling: d^-0.5 where it is None. Keys that several heads share are repeated for each.
    """
    shared = query.shape[1] // key.shape[1]
    keys = key if shared == 1 else key.repeat_interleave(shared, 1)
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ keys.transpose(2, 3)  # fewer to scale


def _whole_scores(query: Tensor, key: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """:func:`scores`; InputError for a layer that sees `window` - 1 tokens to either side alone, and fewer than there are."""
    if window is not None and query.shape[2] > window:
        raise InputError(
            f"expected attention over whole texts, got a layer that sees {window - 1} tokens to either side and texts of "
            f"{query.shape[2]}, whose other scores mean nothing; name layers that see all of it (--method.layers), lower "
            "--data.block_size and --task.length, or give --method.attention_weight 0"
        )
    return scores(query, key, scaling)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """What Transformers calls in each layer: the scores go where they were asked for, the rest is sdpa's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kept = _KEPT.get()
    if kept is not None:
        if more.get("position_bias") is not None:
            raise InputError(
                "expected attention of queries and keys alone, got a bias by position, which is no part of the scores; give "
                "--method.attention_weight 0"
            )
        kept.add(partial(_whole_scores, query, key, more.get("scaling"), more.get("sliding_window")))
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **more)
    return found


@contextmanager
def attention_scores(module: Any) -> Iterator[Scores]:
    """Collects the scores of all layers, [B, h, S, S] each, in the order of calls, of what the module computes within it.

    They have a graph where the forward has one. The model computes as with `sdpa` meanwhile; its own implementation is back
    afterwards, after an error too. One module is not to be in two of these at once.

    Args:
        module: a PreTrainedModel. One whose attention bypasses the interface leaves them empty.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)  # without it padding would get no mask at all
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    before, kept = module.config._attn_implementation, Scores()
    token = _KEPT.set(kept)
    try:
        module.set_attn_implementation(NAME)
        yield kept
    finally:
        _KEPT.reset(token)
        module.set_attn_implementation(before)


@dataclass(frozen=True)
class Shape:
    """Of an encoder: its layers, heads and width."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, network: Network) -> Shape:
        """As its config has them."""
        module: Any = network.module
        config = module.config
        return cls(int(config.num_hidden_layers), int(config.num_attention_heads), int(config.hidden_size))


@dataclass(frozen=True)
class Inside:
    """What is inside an encoder of N layers for a batch of texts.

    Attributes:
        hidden: N + 1 of [B, S, d]: the embeddings, then the output of each layer.
        scores: N of [B, h, S, S], or none.
    """

    hidden: tuple[Tensor, ...]
    scores: Scores


def inside(network: Network, input_ids: Tensor, attention_mask: Tensor, with_scores: bool = True) -> Inside:
    """Hidden states and scores of tokens [B, S] by one forward.

    Raises InputError for a network whose attention does not go through the interface.
    """
    module: Any = network.module
    # what trains goes through net, so that DDP knows of it; a frozen teacher needs no head, which may have a vocabulary to fill
    forward = network.net if network.trainable() else module.base_model
    taking: AbstractContextManager[Scores] = attention_scores(module) if with_scores else nullcontext(Scores())
    with taking as kept, network.active():
        hidden = forward(
            input_ids=input_ids, attention_mask=attention_mask.long(), output_hidden_states=True
        ).hidden_states
    layers = Shape.of(network).layers
    if with_scores and len(kept) != layers:
        raise InputError(
            f"expected the attention scores of {layers} layers, got {len(kept)}: that of {type(module).__name__} does not go "
            "through Transformers' AttentionInterface; give --method.attention_weight 0"
        )
    return Inside(tuple(hidden), kept)
