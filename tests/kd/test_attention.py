"""Attention scores of encoders, against Q K^T / sqrt(d) from the weights, and what their taking leaves as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cloze import masked_model
from encoders import batch_of, bert, scores_by_hand, student, teacher, texts
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.kd.attention import Shape, _attention, attention_scores, inside, scores
from stepdistill.networks.network import Network

EXACT = {"rtol": 0.0, "atol": 0.0}


def given(*indices: int) -> dict[str, Tensor]:
    extra = batch_of(texts(), indices or range(6)).extra
    return {"input_ids": extra["input_ids"], "attention_mask": extra["attention_mask"]}


@pytest.mark.parametrize("heads", [1, 3])
def test_scores_are_the_products_of_queries_and_keys_from_the_weights(heads: int) -> None:
    module = bert(0, layers=3, heads=heads).double()
    found = inside(Network(module), **given())
    assert len(found.hidden) == 4 and len(found.scores) == 3
    states = module(**given(), output_hidden_states=True).hidden_states
    assert_close(found.hidden[0], module.bert.embeddings(input_ids=given()["input_ids"]), **EXACT)
    for layer in range(3):
        assert_close(found.hidden[layer + 1], states[layer + 1], **EXACT)
        assert_close(found.scores[layer], scores_by_hand(module, layer, states[layer], heads), rtol=1e-12, atol=1e-12)


def test_their_softmax_over_real_tokens_is_what_transformers_returns() -> None:
    module, tokens = bert(0), given()
    kept = inside(Network(module), **tokens).scores
    module.set_attn_implementation("eager")
    wanted = module(**tokens, output_attentions=True).attentions
    off = ~tokens["attention_mask"][:, None, None, :]
    for a, p in zip(kept, wanted, strict=True):
        assert_close(a.masked_fill(off, -torch.inf).softmax(-1), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_computes_the_same_and_has_its_own_attention_back(implementation: str) -> None:
    module, tokens = bert(0), given()
    wanted = module(**tokens).logits
    module.set_attn_implementation(implementation)
    with attention_scores(module) as kept:
        assert_close(module(**tokens).logits, wanted, **EXACT)  # as sdpa does, padding masked
    assert module.config._attn_implementation == implementation and len(kept) == 2
    module(**tokens)
    assert len(kept) == 2, "what comes after is not kept"


def test_it_is_back_after_an_error_too() -> None:
    module = bert(0)
    with pytest.raises(RuntimeError, match="stop"), attention_scores(module):
        raise RuntimeError("stop")
    assert module.config._attn_implementation == "sdpa"
    with attention_scores(bert(1)) as kept:
        module(**given())
    assert not kept, "of a model that nobody asked for nothing is kept"


def test_threads_keep_apart() -> None:
    found: dict[str, list[Tensor]] = {}
    together = threading.Barrier(2)

    def take(name: str, module: Any, tokens: dict[str, Tensor]) -> None:
        with torch.no_grad(), attention_scores(module) as kept:
            together.wait()
            module(**tokens)
            together.wait()
        found[name] = list(kept)

    jobs = {"one": (bert(0), given(0, 1)), "other": (bert(1, layers=3), given(5))}
    threads = [threading.Thread(target=take, args=(name, *job)) for name, job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, (module, tokens) in jobs.items():
        assert_close(found[name], list(inside(Network(module), **tokens).scores), **EXACT)


def test_one_within_another_keeps_its_own() -> None:
    outer, inner = bert(0), bert(1, layers=3)
    with attention_scores(outer) as first:
        with attention_scores(inner) as second:
            inner(**given())
        outer(**given())
    assert (len(first), len(second)) == (2, 3)


def test_a_teacher_has_no_graph_and_a_student_has() -> None:
    with torch.no_grad():
        assert not any(a.requires_grad for a in inside(teacher(), **given()).scores)
    pupil = student()
    inside(pupil, **given()).scores[1].sum().backward()
    grads = dict(pupil.module.named_parameters())
    first, last = (grads[f"bert.encoder.layer.{n}.attention.self.query.weight"].grad for n in (0, 1))
    assert first is not None and last is not None and first.abs().max() > 0 and last.abs().max() > 0


def test_scores_are_computed_for_the_layers_that_are_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Tensor]()

    def counted(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
        asked.append(query)
        return scores(query, key, scaling)

    monkeypatch.setattr("stepdistill.kd.attention.scores", counted)
    found = inside(Network(bert(0, layers=3)), **given()).scores
    assert len(found) == 3 and not asked
    one = found[2]
    assert len(asked) == 1
    assert_close([one], found[2:], **EXACT)
    with pytest.raises(IndexError):
        found[3]


def test_keys_that_heads_share_are_repeated() -> None:
    q, k = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3)
    wanted = torch.stack([q[:, h] @ k[:, h // 2].mT for h in range(4)], 1)
    assert_close(scores(q, k, 1.0), wanted)
    assert_close(scores(q, k, None), wanted / 3**0.5)


def test_what_autocast_rounds_in_the_scores_is_less_than_what_it_rounds_before_them() -> None:
    pupil, real = student(), given()["attention_mask"]
    exact = [a.detach() for a in inside(pupil, **given()).scores]
    with torch.autocast("cpu", torch.bfloat16):
        found = [a.detach() for a in inside(pupil, **given()).scores]
    pairs = (real[:, None, :] & real[:, :, None])[:, None]
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        rounding = (b.bfloat16() - b).masked_fill(~pairs, 0.0).norm()
        assert rounding < (a - b).masked_fill(~pairs, 0.0).norm() < 0.05 * b.masked_fill(~pairs, 0.0).norm()


def test_a_bias_by_position_is_refused_where_scores_are_taken_alone() -> None:
    q = torch.randn(1, 2, 3, 4)
    bias = torch.zeros(1, 2, 3, 3)
    module = bert(0)
    with attention_scores(module), pytest.raises(InputError, match=r"bias by position.*attention_weight 0"):
        _attention(module.bert.encoder.layer[0].attention.self, q, q, q, None, position_bias=bias)


def test_attention_that_bypasses_the_interface_is_refused() -> None:
    module: Any = bert(0)

    class Own(nn.Module):
        def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            return hidden, None

    module.bert.encoder.layer[1].attention.self = Own()
    with pytest.raises(InputError, match="attention_weight 0"):
        inside(Network(module), **given())
    assert len(inside(Network(module), **given(), with_scores=False).hidden) == 3
    assert Shape.of(Network(module)) == Shape(2, 3, 12)


@torch.no_grad()
def test_layers_that_see_no_whole_text_are_refused_where_they_are_compared() -> None:
    """ModernBERT's; up to the window a sliding layer is one of whole attention."""
    special = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
    near, far = (masked_model(0, 2, "modernbert", local_attention=size, **special) for size in (8, 64))
    whole = {name: value[:, :5] for name, value in given().items()}
    assert_close(near(**whole).logits, far(**whole).logits, **EXACT)
    found = inside(Network(near), whole["input_ids"], whole["attention_mask"].bool()).scores
    assert_close(found[1], inside(Network(far), **whole).scores[1], **EXACT)
    for size, within in ((6, 4), (10, 4)):
        more = {name: value[:, :size] for name, value in given().items()}
        found = inside(Network(near), **more).scores
        assert found[0].shape[-1] == size, "the first layer sees all of it"
        with pytest.raises(InputError, match=rf"sees {within} tokens .* texts of {size}.*--method\.layers"):
            found[1]
