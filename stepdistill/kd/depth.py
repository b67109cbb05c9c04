"""A shallower masked language model out of some layers of another (DistilBERT, arXiv 1910.01108, section 3).

Of a BERT it becomes a DistilBertForMaskedLM, which has no segments and no pooler; of other BERT layouts the same class with
fewer layers. Everything else, embeddings and the whole head, is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .layouts import seeded
from .masked import MaskedLM

EPSILON = 1e-12  # of DistilBert's layer norms, which its config can't change
# names of a BERT's parts -> of a DistilBert's
PARTS = {
    "bert.embeddings.": "distilbert.embeddings.",
    "attention.self.query.": "attention.q_lin.",
    "attention.self.key.": "attention.k_lin.",
    "attention.self.value.": "attention.v_lin.",
    "attention.output.dense.": "attention.out_lin.",
    "attention.output.LayerNorm.": "sa_layer_norm.",
    "intermediate.dense.": "ffn.lin1.",
    "output.dense.": "ffn.lin2.",
    "output.LayerNorm.": "output_layer_norm.",
    "bert.encoder.layer.": "distilbert.transformer.layer.",
    "cls.predictions.transform.dense.": "vocab_transform.",
    "cls.predictions.transform.LayerNorm.": "vocab_layer_norm.",
    "cls.predictions.decoder.": "vocab_projector.",
}
SEGMENTS, POSITIONS = "bert.embeddings.token_type_embeddings.weight", "distilbert.embeddings.position_embeddings.weight"
TWICE = "cls.predictions.bias"  # another name of the decoder's bias


def spread(deep: int, shallow: int) -> tuple[int, ...]:
    """Which of `deep` layers make `shallow`: first, last, evenly between; 0, 2, 4, 7, 9, 11 of 12, as the reference code."""
    if not 1 <= shallow <= deep:
        raise InputError(
            f"expected a student of 1 to {deep} layers, as many as its teacher has, got {shallow}; fix --student.depth"
        )
    if shallow == 1:
        return (0,)
    return tuple((2 * i * (deep - 1) + shallow - 1) // (2 * (shallow - 1)) for i in range(shallow))  # rounded half up


def check_layers(layers: Sequence[int], deep: int) -> tuple[int, ...]:
    """A stated map: numbers of the teacher's layers, from the bottom up. InputError for one that doesn't fit."""
    wrong = [layer for layer in layers if not 0 <= layer < deep]
    if not layers or wrong or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise InputError(
            f"expected numbers of the teacher's {deep} layers, 0 to {deep - 1}, each above the one before, got "
            f"{','.join(map(str, layers)) or 'none'}{f' ({wrong[0]} is none of them)' if wrong else ''}; fix --student.layers"
        )
    return tuple(layers)


def shallower(teacher: MaskedLM, layers: Sequence[int], keep_segment: bool = True, seed: int | None = None) -> MaskedLM:
    """A new network of the teacher's `layers`, on its device, in float32.

    Args:
        teacher: not changed; its weights may still train.
        layers: as :func:`check_layers` returns them.
        keep_segment: of a BERT, segment 0's embedding is added to those of positions: DistilBert has none, and a text of one
            segment then gets the embeddings that it had. Without it they are what word and position are alone, as in the
            reference code.
        seed: random weights instead of the teacher's, drawn from it.

    Raises InputError for a model that is no stack of layers like BERT's.
    """
    module: Any = teacher.module
    build, state = (_distilbert if is_bert(teacher) else _same)(teacher, layers, keep_segment)
    student = seeded(0 if seed is None else seed, build)
    if seed is None:
        try:
            student.load_state_dict(state)
        except RuntimeError as error:
            if layers[0] != 0:  # ModernBERT's first layer has no norm before its attention
                raise InputError(
                    f"expected layer 0 to begin a student of a {type(module).__name__}, where a layer's place decides what is "
                    f"in it, got {','.join(map(str, layers))}; begin --student.layers with 0"
                ) from error
            raise _no_layout(module, " ".join(str(error).split())[:200]) from error
    return MaskedLM(student.float().to(next(module.parameters()).device))


def is_bert(teacher: MaskedLM) -> bool:
    """Whether its layers are those of a DistilBert, too."""
    config = teacher.config
    return bool(config.model_type == "bert" and config.layer_norm_eps == EPSILON and not config.is_decoder)


def _distilbert(teacher: MaskedLM, layers: Sequence[int], keep_segment: bool) -> tuple[Any, dict[str, Tensor]]:
    """(what builds the student, its weights)."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    c = teacher.config
    config = DistilBertConfig(
        vocab_size=c.vocab_size, max_position_embeddings=c.max_position_embeddings, n_layers=len(layers),
        n_heads=c.num_attention_heads, dim=c.hidden_size, hidden_dim=c.intermediate_size, dropout=c.hidden_dropout_prob,
        attention_dropout=c.attention_probs_dropout_prob, activation=c.hidden_act, initializer_range=c.initializer_range,
        pad_token_id=c.pad_token_id, bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id,
        tie_word_embeddings=c.tie_word_embeddings,
    )  # fmt: skip
    theirs = _chosen(teacher, "bert.encoder.layer", layers)
    segments = theirs.pop(SEGMENTS)  # section 3: no token-type embeddings
    theirs.pop(TWICE, None)
    state = {_renamed(name): value for name, value in theirs.items()}
    if keep_segment:
        # not to the words', which the head shares: it would change every logit
        state[POSITIONS] = state[POSITIONS] + segments[0]
    return lambda: DistilBertForMaskedLM(config), state


def _renamed(name: str) -> str:
    """A weight of a BERT by its name in a DistilBert."""
    for theirs, ours in PARTS.items():
        if theirs in name:
            name = name.replace(theirs, ours, 1)
    return name


def _same(teacher: MaskedLM, layers: Sequence[int], _keep_segment: bool) -> tuple[Any, dict[str, Tensor]]:
    """The teacher's own class and weights with fewer layers."""
    module: Any = teacher.module
    stacks = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == teacher.depth and name.startswith(teacher.body)
    ]
    if len(stacks) != 1:
        raise _no_layout(module, f"{len(stacks)} lists of {teacher.depth} layers")
    config = copy.deepcopy(teacher.config)
    if kinds := config.to_dict().get("layer_types"):  # ModernBERT's, of whole and of sliding attention
        config.layer_types = [kinds[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    return lambda: type(module)(config), _chosen(teacher, stacks[0], layers)


def _chosen(teacher: MaskedLM, stack: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """The teacher's weights with those of `layers` alone, numbered anew."""
    places: Mapping[int, int] = {layer: i for i, layer in enumerate(layers)}
    found = {}
    for name, value in teacher.module.state_dict().items():
        if not name.startswith(f"{stack}."):
            found[name] = value
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in places:
            found[f"{stack}.{places[int(number)]}.{rest}"] = value
    return found


def _no_layout(module: nn.Module, why: str) -> InputError:
    return InputError(
        f"expected a masked language model whose layers are a stack like BERT's, got {type(module).__name__} ({why}); give "
        "--teacher.path a BERT, RoBERTa, DistilBERT or ModernBERT"
    )
