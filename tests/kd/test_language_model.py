"""Distillation on text: against sums written out, and what must not matter: padding, order, cuts, processes, vocabularies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from language import END, FULL, VOCABULARY, batch_of, gpt2, llama, student, teacher, uneven
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from toys import EXACT, Killed, options, recorded, rows, same, saved, stopping_after

from stepdistill.data.tokens import Row, TokenRows, Tokens
from stepdistill.errors import InputError
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig, NextToken, token_loss
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.reduction import Objective
from stepdistill.method import Method
from stepdistill.training.trainer import Trainer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def gradients(method: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in method.student.named_trainable().items() if p.grad is not None}


def by_hand(pupil: CausalLM, wise: CausalLM, data: TokenRows, kd: float, ce: float, temperature: float) -> Tensor:
    """The objective's mean, one row and one token after the other."""
    total, count = torch.zeros(()), 0
    for row in data.rows:
        ids = torch.tensor([row.ids])
        z, p = pupil.module(ids).logits[0], wise.module(ids).logits[0].detach()
        for place in range(len(row.ids) - 1):
            if row.learned[place + 1]:
                log_q, log_p = (functional.log_softmax(x[place] / temperature, 0) for x in (z, p))
                total = total + kd * temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
                total = total - ce * functional.log_softmax(z[place], 0)[row.ids[place + 1]]
                count += 1
    return total / count


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_loss_is_the_sum_over_targets_written_out(build: Any) -> None:
    pupil, wise = CausalLM(build(1)).student(FULL), CausalLM(build(0)).frozen()
    config = LanguageModelKDConfig(Divergence(temperature=2.0), kd_weight=0.7, ce_weight=0.4, chunk_size=3)
    data = uneven(5, prompt=2)
    method = LanguageModelKD(config, pupil, wise)
    losses = method.training_step(batch_of(data, range(5)))
    wanted = by_hand(pupil, wise, data, 0.7, 0.4, 2.0)
    assert_close(losses.total, wanted, **CLOSE)
    assert float(losses.count) == sum(sum(row.learned[1:]) for row in data.rows)
    assert_close(0.7 * losses.metrics["kd"] + 0.4 * losses.metrics["ce"], losses.total.detach(), **CLOSE)
    losses.total.backward()
    found = gradients(method)
    pupil.module.zero_grad()
    by_hand(pupil, wise, data, 0.7, 0.4, 2.0).backward()
    assert_close(found, gradients(method), rtol=1e-4, atol=1e-6)


def test_models_with_other_heads_go_through_whole_logits_to_the_same_numbers() -> None:
    config = LanguageModelKDConfig(Divergence("jsd"), ce_weight=0.5)
    pupil, wise = student(), teacher()
    wanted = LanguageModelKD(config, pupil, wise).training_step(batch_of(uneven(), range(4))).total
    for opaque in (pupil, wise):
        opaque.explained = False
        found = LanguageModelKD(config, pupil, wise).training_step(batch_of(uneven(), range(4))).total
        assert_close(found, wanted, **CLOSE)
        opaque.explained = True


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind: Any) -> None:
    pupil, wise = CausalLM(gpt2(0)).student(FULL), CausalLM(gpt2(0)).frozen()
    method = LanguageModelKD(LanguageModelKDConfig(Divergence(kind)), pupil, wise)
    total = method.training_step(batch_of(uneven(), range(8))).total
    total.backward()
    assert abs(total.item()) < 1e-6
    assert all(float(g.abs().max()) < 1e-5 for g in gradients(method).values())


def test_only_the_row_before_a_target_gets_a_gradient() -> None:
    """Of a, b, c, d with c a target alone: the logits of b."""
    kept: list[Tensor] = []
    pupil, wise = student(), teacher()
    pupil.explained = False
    call = type(pupil).__call__

    class Watching(CausalLM):
        def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
            logits = call(self, ids, mask)
            logits.retain_grad()
            kept.append(logits)
            return logits

    pupil.__class__ = Watching
    data = TokenRows([Row((1, 2, 3, 4), (False, False, True, False))], END)
    LanguageModelKD(LanguageModelKDConfig(ce_weight=1.0), pupil, wise).training_step(
        batch_of(data, [0])
    ).total.backward()
    assert kept[0].grad is not None
    assert kept[0].grad.abs().sum(2)[0].ne(0).tolist() == [False, True, False, False]


def test_nothing_learned_is_zero_with_a_graph_and_counts_nothing() -> None:
    data = TokenRows([Row((1, 2, 3), (False,) * 3)], END)
    for method in (LanguageModelKD(LanguageModelKDConfig(ce_weight=1.0), student(), teacher()), NextToken(student())):
        losses = method.training_step(batch_of(data, [0]))
        losses.total.backward()
        assert losses.total.item() == 0.0 and float(losses.count) == 0.0
        assert all(not g.isnan().any() and not g.any() for g in gradients(method).values())


def test_padding_on_the_left_and_the_right_are_one() -> None:
    pupil, wise, objective = student(), teacher(), Objective(Divergence("jsd"), 1.0, 0.5)
    data = uneven(4, prompt=3)
    right = Tokens.of(batch_of(data, range(4)))
    shifts = right.input_ids.shape[1] - right.attention_mask.sum(1)
    left = Tokens(
        *(torch.stack([row.roll(int(s)) for row, s in zip(x, shifts, strict=True)]) for x in vars(right).values())
    )
    one, other = (token_loss(objective, pupil, wise, t) for t in (right, left))
    assert one.count == other.count
    assert_close(one.total, other.total, **CLOSE)
    unmasked = Tokens(left.input_ids, left.attention_mask, left.attention_mask)
    assert token_loss(objective, pupil, wise, unmasked).count == int((left.attention_mask.sum(1) - 1).sum()), (
        "the row before the first token is padding"
    )


def test_tables_padded_to_other_sizes_are_compared_on_what_they_share() -> None:
    wide = gpt2(1, vocabulary=VOCABULARY + 8)
    pupil, wise = CausalLM(wide).student(FULL), teacher()
    method = LanguageModelKD(LanguageModelKDConfig(), pupil, wise)
    batch = batch_of(uneven(), range(4))
    total = method.training_step(batch).total
    total.backward()
    grad = wide.transformer.wte.weight.grad
    assert grad[:VOCABULARY].abs().sum() > 0 and not grad[VOCABULARY:].any(), (
        "entries that the teacher lacks are left alone"
    )
    before = total.detach()
    with torch.no_grad():
        wide.transformer.wte.weight[VOCABULARY:] += 3.0
    assert_close(method.training_step(batch).total.detach(), before, **CLOSE)


def test_the_teacher_is_read_without_a_graph_and_said_to_be_small() -> None:
    pupil, wise = student(width=32), teacher(width=16)
    for parameter in wise.module.parameters():
        parameter.requires_grad_(True)
    method = LanguageModelKD(LanguageModelKDConfig(), pupil, wise)
    for factored in (True, False):
        wise.explained = factored
        with recorded(wise.module.transformer.h[0].mlp.c_fc) as calls:
            method.training_step(batch_of(uneven(), range(4))).total.backward()
        assert [with_grad for _, with_grad in calls] == [False]
    assert all(p.grad is None for p in wise.module.parameters())
    assert "wrong way round" in method.watch({}) and method.watch({}) == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kd_weight": 0.0}, "--method.kd_weight"), ({"kd_weight": -1.0}, "--method.kd_weight"),
        ({"ce_weight": float("inf")}, "--method.ce_weight"), ({"chunk_size": 0}, "--method.chunk_size"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        LanguageModelKDConfig(**change)


# -- through the trainer ---------------------------------------------------------------------------------------------------


def made(kind: str = "kd", seed: int = 1) -> Method:
    if kind == "plain":
        return NextToken(student(seed))
    return LanguageModelKD(LanguageModelKDConfig(Divergence("jsd"), ce_weight=0.3), student(seed), teacher())


def fit(folder: Path, method: Method, **changes: Any) -> Method:
    Trainer(options(**{"max_train_steps": 5, "adam_epsilon": 1e-3, **changes}), folder).fit(method, uneven(prompt=3))
    return method


@pytest.mark.parametrize("kind", ["kd", "plain"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    fit(tmp_path / "whole", made(kind), **changes)
    dying = made(kind)
    with pytest.raises(Killed), stopping_after(dying, 4, Killed.now):
        fit(tmp_path / "killed", dying, **changes)
    fit(tmp_path / "killed", made(kind, seed=7), **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["kd", "plain"])
def test_one_batch_of_eight_is_two_of_four_with_rows_of_other_lengths(tmp_path: Path, kind: str) -> None:
    fit(tmp_path / "one", made(kind))
    fit(tmp_path / "two", made(kind), train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-5, atol=1e-5)


def test_the_trained_student_comes_near(tmp_path: Path) -> None:
    wise = teacher()
    method = LanguageModelKD(LanguageModelKDConfig(), student(), wise)
    fit(tmp_path, method, max_train_steps=60, adam_epsilon=1e-8)
    losses = [row["kd"] for row in rows(tmp_path)]
    assert losses[-1] < 0.3 * losses[0]
    assert method.student.module.training
    assert_close(dict(wise.module.state_dict()), dict(teacher().module.state_dict()), **EXACT)
