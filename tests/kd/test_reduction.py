"""Sums over valid tokens: masks, the shift, what a masked token may hold, and the count that the trainer is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.reduction import Objective, TokenLoss, dense_loss, length_mask, masked_sum, next_token

EXACT = {"rtol": 0, "atol": 0}
TIGHT = {"rtol": 0.0, "atol": 1e-12}
B, S, V = 3, 5, 7
BOTH = Objective(Divergence("jsd", 0.3, temperature=2.0), 0.7, 0.4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's logits, teacher's, mask, labels."""
    mask = length_mask(torch.tensor([5, 2, 3]), S, torch.tensor([1, 0, 2]))
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(2))
    return drawn(B, S, V).requires_grad_(), drawn(B, S, V, seed=1), mask, labels


def test_masks_come_from_lengths() -> None:
    mask = length_mask(torch.tensor([3, 0, 4]), 4)
    assert mask.tolist() == [[True] * 3 + [False], [False] * 4, [True] * 4]
    assert length_mask(torch.tensor([3, 4]), 4, torch.tensor([1, 4])).tolist() == [
        [False, True, True, False],
        [False] * 4,
    ]


def test_an_end_token_that_pads_too_is_learned_once() -> None:
    """A mask by ids would drop the true end with the padding."""
    end, tokens = 0, torch.tensor([[5, 6, 0, 0, 0], [5, 6, 7, 8, 0]])
    mask = length_mask(torch.tensor([3, 5]), 5)
    _, labels, valid = next_token(torch.zeros(2, 5, 9), tokens, mask)
    assert [row[keep].tolist() for row, keep in zip(labels, valid, strict=True)] == [[6, end], [6, 7, 8, end]]
    logits = torch.zeros(2, 4, 9, requires_grad=True)
    dense_loss(Objective(ce_weight=1.0, kd_weight=0.0), logits, None, valid, labels).total.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1, end] == pytest.approx(1 / 9 - 1)  # the row of token 6 is taught to end
    assert logits.grad[0, 2:].abs().max() == 0


def test_which_row_learns_which_token() -> None:
    """Two tokens, the second to be learned: the first row alone gets a gradient, towards the second token."""
    logits, tokens = torch.zeros(1, 2, 3, requires_grad=True), torch.tensor([[1, 2]])
    mask = torch.tensor([[False, True]])
    rows, labels, valid = next_token(logits, tokens, mask)
    loss = dense_loss(Objective(kd_weight=0.0, ce_weight=1.0), rows, None, valid, labels)
    loss.total.backward()
    assert logits.grad is not None and loss.count == 1
    assert_close(logits.grad, torch.tensor([[[1 / 3, 1 / 3, -2 / 3], [0.0, 0.0, 0.0]]]))
    rows, labels, valid = next_token(logits, tokens, torch.tensor([[True, False]]))
    assert not valid.any()  # nothing predicts the first token


def test_rows_of_padding_on_the_left_predict_nothing() -> None:
    tokens = torch.tensor([[9, 9, 4, 5]])
    attention = torch.tensor([[0, 0, 1, 1]])
    _, labels, valid = next_token(torch.zeros(1, 4, 3), tokens, attention.bool(), attention)
    assert labels[valid].tolist() == [5]
    _, labels, valid = next_token(torch.zeros(1, 4, 3), tokens, torch.tensor([[False, False, False, True]]), attention)
    assert labels[valid].tolist() == [5]


def test_sums_are_those_of_the_formula() -> None:
    z, teacher, mask, labels = case()
    found = dense_loss(BOTH, z, teacher, mask, labels)
    kd = BOTH.divergence(z, teacher)[mask].sum()
    ce = -torch.log_softmax(z, -1).gather(-1, labels[..., None])[..., 0][mask].sum()  # at T = 1
    assert found.count == 7 == int(mask.sum())
    for value, wanted in ((found.kd, kd), (found.ce, ce), (found.total, 0.7 * kd + 0.4 * ce)):
        assert_close(value, wanted, **TIGHT, check_dtype=False)
    assert_close(found.mean, found.total / 7, **EXACT)
    assert found.total.requires_grad and not found.kd.requires_grad and not found.ce.requires_grad


def test_what_a_method_returns() -> None:
    z, teacher, mask, labels = case()
    found = dense_loss(BOTH, z, teacher, mask, labels)
    losses = found.losses("gkd")
    assert losses.count == 7.0 and losses.terms.keys() == {"gkd"}
    assert_close(losses.total, found.mean, **EXACT)
    assert_close(losses.metrics, {"kd": found.kd / 7, "ce": found.ce / 7}, **EXACT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_may_hold_anything(value: float) -> None:
    z, teacher, mask, labels = case()
    wanted = dense_loss(BOTH, z, teacher, mask, labels)
    (clean,) = torch.autograd.grad(wanted.total, z)
    spoiled, spoiled_teacher = (torch.where(mask[..., None], x.detach(), value) for x in (z, teacher))
    spoiled.requires_grad_()
    found = dense_loss(BOTH, spoiled, spoiled_teacher, mask, torch.where(mask, labels, -100))
    (gradient,) = torch.autograd.grad(found.total, spoiled)
    assert_close(found.total, wanted.total, **EXACT)
    assert_close(gradient, clean, **EXACT)


def test_more_padding_and_another_order_change_nothing() -> None:
    z, teacher, mask, labels = case()
    wanted = dense_loss(BOTH, z, teacher, mask, labels)

    def padded(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :2], value)], 1)

    found = dense_loss(BOTH, padded(z, 3.0), padded(teacher, -2.0), padded(mask, 0), padded(labels, 1))
    assert_close(found.total, wanted.total, **EXACT)
    order = [2, 0, 1]
    found = dense_loss(BOTH, z[order], teacher[order], mask[order], labels[order])
    assert_close(found.mean, wanted.mean, **TIGHT)


@pytest.mark.parametrize("objective", [BOTH, Objective(), Objective(kd_weight=0.0, ce_weight=1.0)])
def test_nothing_valid_is_zero_with_a_graph(objective: Objective) -> None:
    z, teacher, mask, labels = case()
    found = dense_loss(objective, z * math.inf, teacher, torch.zeros_like(mask), labels)
    assert (found.total.item(), found.mean.item(), found.count) == (0.0, 0.0, 0)
    found = dense_loss(objective, z, teacher, torch.zeros_like(mask), labels)
    (gradient,) = torch.autograd.grad(found.losses().total, z)
    assert_close(gradient, torch.zeros_like(z), **EXACT)


def test_a_masked_sum_leaves_out_what_is_not_a_number() -> None:
    values = torch.tensor([[1.0, math.nan], [2.0, 4.0]], requires_grad=True)
    total, count = masked_sum(values, torch.tensor([[True, False], [False, True]]))
    total.backward()
    assert (total.item(), count) == (5.0, 2)
    assert values.grad is not None and values.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    total, count = masked_sum(values, torch.zeros(2, 2, dtype=torch.bool))
    assert (total.item(), count, total.requires_grad) == (0.0, 0, True)


def test_labels_are_over_all_entries_of_the_student() -> None:
    """The divergence is restricted to the shared ones, the cross-entropy is the student's own."""
    z, teacher, mask, labels = case()
    narrow = teacher[..., :5]
    found = dense_loss(BOTH, z, narrow, mask, labels)
    alone = dense_loss(Objective(kd_weight=0.0, ce_weight=0.4), z, None, mask, labels)
    assert_close(found.ce, alone.ce, **EXACT)
    assert_close(found.kd, dense_loss(BOTH, z[..., :5], narrow, mask, labels % 5).kd, **EXACT)
    assert alone.kd == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "mask": a["mask"].float()}, "bool mask"),
        (lambda a: {**a, "mask": a["mask"][:, 1:]}, r"bool mask \[3, 5\]"),
        (lambda a: {**a, "teacher": None}, "got none"),
        (lambda a: {**a, "teacher": a["teacher"][:, 1:]}, r"teacher's outputs \[3, 5\]"),
        (lambda a: {**a, "labels": None}, "labels"),
        (lambda a: {**a, "labels": a["labels"][1:]}, "labels"),
        (lambda a: {**a, "labels": a["labels"] * 0 - 100}, r"labels in \[0, 7\)"),
        (lambda a: {**a, "labels": a["labels"] * 0 + 7}, r"labels in \[0, 7\)"),
    ],
)
def test_inputs_that_do_not_belong_together(change: Any, message: str) -> None:
    z, teacher, mask, labels = case()
    given = change({"teacher": teacher, "mask": mask, "labels": labels})
    with pytest.raises(ValueError, match=message):
        dense_loss(BOTH, z, given["teacher"], given["mask"], given["labels"])


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_weights_that_minimise_nothing(weights: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="weights"):
        Objective(Divergence(), *weights)


def test_shapes_of_the_shift() -> None:
    with pytest.raises(ValueError, match="outputs, tokens and mask"):
        next_token(torch.zeros(2, 4, 3), torch.zeros(2, 5).long(), torch.zeros(2, 5).bool())


def test_a_mean_of_nothing_is_zero() -> None:
    assert TokenLoss(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0), 0).mean == 0
