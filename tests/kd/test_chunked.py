"""The loss from hidden states is the dense one: every chunk size, head, mask and precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.kd import chunked
from stepdistill.kd.chunked import Head, chunked_loss
from stepdistill.kd.divergences import Divergence, Kind
from stepdistill.kd.reduction import Objective, TokenLoss, dense_loss

EXACT = {"rtol": 0, "atol": 0}
TIGHT = {"rtol": 0.0, "atol": 1e-12}
B, S = 3, 5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """Inputs of a loss; the student's tensors require grad."""

    hidden: Tensor
    head: Head
    teacher_hidden: Tensor
    teacher_head: Head
    mask: Tensor
    labels: Tensor

    @classmethod
    def make(
        cls, entries: tuple[int, int] = (11, 11), bias: bool = False, softcap: float | None = None, **kind: Any
    ) -> Case:
        """Widths 4 and 6; 11 of 15 tokens are valid."""
        student, teacher = entries
        biases = (drawn(student, seed=4).requires_grad_(), drawn(teacher, seed=5)) if bias else (None, None)
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[0, 3:] = mask[2, :2] = False
        case = cls(
            drawn(B, S, 4, seed=0).requires_grad_(),
            Head(drawn(student, 4, seed=1).requires_grad_(), biases[0], softcap),
            drawn(B, S, 6, seed=2),
            Head(drawn(teacher, 6, seed=3), biases[1], softcap and 0.7 * softcap),
            mask,
            torch.randint(student, (B, S), generator=torch.Generator().manual_seed(6)),
        )
        return replace(case, **kind)

    def chunked(self, objective: Objective, size: int = 4) -> TokenLoss:
        return chunked_loss(
            objective, self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.mask, self.labels, size
        )

    def dense(self, objective: Objective) -> TokenLoss:
        z, teacher = self.head.logits(self.hidden), self.teacher_head.logits(self.teacher_hidden)
        return dense_loss(objective, z, teacher, self.mask, self.labels)

    def inputs(self) -> list[Tensor]:
        given = (self.hidden, self.head.weight, self.head.bias)
        return [x for x in given if x is not None and x.requires_grad]

    def same(self, objective: Objective, size: int = 4, **close: Any) -> None:
        """Both ways give the same sums and gradients."""
        close = close or TIGHT
        found, wanted = self.chunked(objective, size), self.dense(objective)
        assert found.count == wanted.count
        assert_close([found.total, found.kd, found.ce], [wanted.total, wanted.kd, wanted.ce], **close)
        gradients = torch.autograd.grad(found.mean * 3.0, self.inputs())
        assert_close(gradients, torch.autograd.grad(wanted.mean * 3.0, self.inputs()), **close)


PLAIN = Objective(Divergence("jsd"), 0.7)
BOTH = Objective(Divergence("jsd", 0.3, temperature=2.0), 0.7, 0.4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_divergence(kind: Kind, temperature: float) -> None:
    Case.make().same(Objective(Divergence(kind, 0.3, 0.2, temperature)))


@pytest.mark.parametrize("size", [*range(1, 13), 1000])
def test_every_chunk_size(size: int) -> None:
    """11 tokens: none of them fits but 1 and 11."""
    Case.make(bias=True).same(BOTH, size)


@pytest.mark.parametrize("tile", [1, 23, 10_000])
def test_rows_worked_on_together(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CACHED", tile)
    Case.make().same(BOTH, 5)


@pytest.mark.parametrize("objective", [PLAIN, BOTH, Objective(kd_weight=0.0, ce_weight=2.0)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entries", [(11, 11), (11, 8), (11, 14)])
def test_every_head(objective: Objective, entries: tuple[int, int], bias: bool, softcap: float | None) -> None:
    Case.make(entries, bias, softcap).same(objective)


@pytest.mark.parametrize("entries", [(11, 11), (11, 8), (11, 14)])
def test_cross_entropy_at_the_divergence_s_own_temperature(entries: tuple[int, int]) -> None:
    """The one log-softmax serves both where the tables agree; with others it can't."""
    Case.make(entries).same(Objective(Divergence("reverse_kl"), 0.7, 0.4))


def test_without_labels_entries_beyond_the_teacher_s_get_no_gradient() -> None:
    case = Case.make((11, 8), bias=True)
    _, weight, bias = torch.autograd.grad(case.chunked(PLAIN).total, case.inputs())
    assert weight.shape == (11, 4) and weight[8:].abs().max() == 0 and bias[8:].abs().max() == 0
    assert weight[:8].abs().min() > 0


def test_finite_differences_agree() -> None:
    case = Case.make(bias=True, softcap=2.0)

    gradients = torch.autograd.grad(case.chunked(BOTH).total, case.inputs())
    directions = [drawn(*x.shape, seed=10 + i) for i, x in enumerate(case.inputs())]

    def total(step: float) -> Tensor:
        hidden, weight, bias = (x.detach() + step * d for x, d in zip(case.inputs(), directions, strict=True))
        return replace(case, hidden=hidden, head=Head(weight, bias, 2.0)).chunked(BOTH).total

    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert_close((total(1e-5) - total(-1e-5)) / 2e-5, slope, rtol=1e-7, atol=0.0)


def test_a_head_tied_to_the_embedding() -> None:
    """Its gradient is the sum of both uses."""
    tokens = torch.randint(11, (B, S), generator=torch.Generator().manual_seed(7))
    case = Case.make()
    weight = case.head.weight

    def gradient(loss: str) -> Tensor:
        tied = replace(case, hidden=torch.tanh(nn.functional.embedding(tokens, weight)))
        return torch.autograd.grad(getattr(tied, loss)(PLAIN).mean, weight)[0]

    assert_close(gradient("chunked"), gradient("dense"), **TIGHT)
    (alone,) = torch.autograd.grad(replace(case, hidden=case.hidden.detach()).chunked(PLAIN).mean, weight)
    assert (gradient("chunked") - alone).abs().max() > 1e-3


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden", "weight and bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    case = Case.make(bias=True)
    hidden = case.hidden.detach() if "hidden" in frozen else case.hidden
    weight = case.head.weight.detach() if "weight" in frozen else case.head.weight
    bias = case.head.bias.detach() if "bias" in frozen and case.head.bias is not None else case.head.bias
    replace(case, hidden=hidden, head=Head(weight, bias)).same(BOTH)


def test_a_frozen_head_costs_no_gradient_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = chunked.Layer.to_weight
    monkeypatch.setattr(chunked.Layer, "to_weight", lambda *a: (asked.append(1), original(*a)))
    case = Case.make()
    case.chunked(PLAIN)
    assert len(asked) == 3
    replace(case, head=Head(case.head.weight.detach())).chunked(PLAIN)
    with torch.no_grad():
        case.chunked(PLAIN)
    assert len(asked) == 3


def test_without_grad_the_values_are_the_same() -> None:
    case = Case.make(bias=True, softcap=2.0)
    wanted = case.chunked(BOTH)
    with torch.no_grad():
        found = case.chunked(BOTH)
    assert not found.total.requires_grad and wanted.total.requires_grad
    assert_close([found.total, found.kd, found.ce], [wanted.total, wanted.kd, wanted.ce], **TIGHT)


def test_nothing_of_a_masked_token_is_looked_at() -> None:
    case = Case.make(bias=True)
    wanted = torch.autograd.grad(case.chunked(BOTH).total, case.inputs())
    keep = case.mask[..., None]
    spoiled = replace(
        case,
        hidden=torch.where(keep, case.hidden.detach(), math.nan).requires_grad_(),
        teacher_hidden=torch.where(keep, case.teacher_hidden, math.inf),
        labels=torch.where(case.mask, case.labels, -100),
    )
    found = torch.autograd.grad(spoiled.chunked(BOTH).total, spoiled.inputs())
    assert_close(found, wanted, **EXACT)
    assert found[0][~case.mask].abs().max() == 0


@pytest.mark.parametrize("objective", [PLAIN, BOTH, Objective(kd_weight=0.0, ce_weight=2.0)])
def test_nothing_valid_is_zero_with_a_graph(objective: Objective) -> None:
    case = Case.make(bias=True)
    found = replace(case, mask=torch.zeros_like(case.mask)).chunked(objective)
    assert (found.total.item(), found.count, found.total.requires_grad) == (0.0, 0, True)
    gradients = torch.autograd.grad(found.losses().total, case.inputs())
    assert_close(gradients, tuple(torch.zeros_like(x) for x in case.inputs()), **EXACT)


def test_no_second_derivative_and_no_second_backward() -> None:
    case = Case.make()
    with pytest.raises(RuntimeError, match="no second derivative; use dense_loss"):
        torch.autograd.grad(case.chunked(PLAIN).total, case.inputs(), create_graph=True)
    loss = case.chunked(PLAIN).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward, got a second"):
        loss.backward()


def single(case: Case, dtype: torch.dtype = torch.float32) -> Case:
    """The same numbers, rounded."""
    heads = [Head(h.weight.detach().to(dtype), None, h.softcap) for h in (case.head, case.teacher_head)]
    heads[0].weight.requires_grad_()
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    return replace(
        case, hidden=hidden, head=heads[0], teacher_hidden=case.teacher_hidden.to(dtype), teacher_head=heads[1]
    )


def test_single_precision() -> None:
    single(Case.make(softcap=2.0)).same(BOTH, 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [4, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_in_the_gradients(
    dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the same rounded numbers: the loss is exact to float32, gradients to one rounding at the end."""
    monkeypatch.setattr(chunked, "PART", part)
    rounded = single(Case.make(softcap=3.0), dtype)
    wide = single(rounded, torch.float64)
    found, wanted = rounded.chunked(BOTH, 1), wide.dense(BOTH)
    assert_close(found.total.double(), wanted.total, rtol=1e-6, atol=0.0)
    gradients = torch.autograd.grad(found.total, rounded.inputs())
    for gradient, exact in zip(gradients, torch.autograd.grad(wanted.total, wide.inputs()), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_rounded_factors_as_on_a_gpu(low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autocast does there, here: factors of products are rounded, sums are not."""
    monkeypatch.setattr(chunked, "_low_precision", lambda weight, wide: low)
    case = single(Case.make(softcap=3.0))
    found, wanted = case.chunked(BOTH, 2), single(case, torch.float64).dense(BOTH)
    eps = torch.finfo(low).eps
    assert_close(found.total.double(), wanted.total, rtol=4 * eps, atol=0.0)
    assert found.total.item() != wanted.total.item()
    gradients = torch.autograd.grad(found.total, case.inputs())
    wide = single(case, torch.float64)
    for gradient, exact in zip(gradients, torch.autograd.grad(wide.dense(BOTH).total, wide.inputs()), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 4 * eps * exact.norm()


def test_small_gradients_are_not_lost_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below its smallest number: they come before any loss scale."""
    monkeypatch.setattr(chunked, "_low_precision", lambda weight, wide: torch.float16)
    layer = chunked.Layer(Head(torch.ones(3, 2)), 3, torch.float32)
    to_hidden, to_weight = torch.zeros(1, 2), torch.zeros(3, 2)
    layer.to_hidden(torch.full((1, 3), 1e-9), to_hidden)
    layer.to_weight(torch.full((1, 3), 1e-9), torch.ones(1, 2), to_weight)
    assert_close(to_hidden, torch.full((1, 2), 3e-9), rtol=1e-6, atol=0.0)
    assert_close(to_weight, torch.full((3, 2), 1e-9), rtol=1e-6, atol=0.0)


def test_autocast_rounds_nothing_on_a_cpu() -> None:
    case = single(Case.make())
    wanted = case.chunked(BOTH)
    exact = torch.autograd.grad(wanted.total, case.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = case.chunked(BOTH)
    assert_close(found.total, wanted.total, **EXACT)
    assert_close(torch.autograd.grad(found.total, case.inputs()), exact, **EXACT)


def test_teachers_in_another_precision() -> None:
    case = single(Case.make())
    rounded = single(case, torch.bfloat16)
    mixed = replace(case, teacher_hidden=rounded.teacher_hidden, teacher_head=rounded.teacher_head)
    wide = single(rounded, torch.float32)
    wanted = replace(case, teacher_hidden=wide.teacher_hidden, teacher_head=wide.teacher_head).dense(BOTH)
    assert_close(mixed.chunked(BOTH).total, wanted.total, rtol=1e-6, atol=0.0)


def test_many_chunks_lose_nothing_in_half_precision() -> None:
    """1,024 equal tokens, one at a time: a sum in bfloat16 would stop growing at 256 of them."""
    count = 1024
    hidden = torch.ones(count, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.bfloat16, requires_grad=True)
    teacher = Head(torch.tensor([[-1.0, 0.0], [0.0, 0.5]], dtype=torch.bfloat16))
    mask = torch.ones(count, dtype=torch.bool)
    loss = chunked_loss(Objective(), hidden, Head(weight), hidden, teacher, mask, chunk_size=1)
    (gradient,) = torch.autograd.grad(loss.total, weight)
    wanted = count * (torch.sigmoid(torch.tensor(0.5)) - torch.sigmoid(torch.tensor(-1.5)))
    assert_close(gradient[0].float(), wanted.expand(2), rtol=0.004, atol=0.0)


def test_heads_are_read_from_layers() -> None:
    layer = nn.Linear(4, 7)
    head = Head.of(layer, 5.0)
    assert head.weight is layer.weight and head.bias is layer.bias
    hidden = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert_close(head.logits(hidden), 5.0 * torch.tanh(layer(hidden) / 5.0))
    assert_close(Head.of(layer).logits(hidden), layer(hidden))


def test_bad_input() -> None:
    case = Case.make()
    with pytest.raises(InputError, match=r"chunk_size >= 1, got 0; fix --method\.chunk_size"):
        case.chunked(PLAIN, 0)
    with pytest.raises(ValueError, match="the teacher's head"):
        chunked_loss(PLAIN, case.hidden, case.head, case.teacher_hidden, None, case.mask)
    with pytest.raises(ValueError, match="teacher's outputs"):
        chunked_loss(PLAIN, case.hidden, case.head, None, None, case.mask)
    with pytest.raises(ValueError, match=r"labels in \[0, 11\)"):
        replace(case, labels=case.labels + 11).chunked(BOTH)
    with pytest.raises(ValueError, match="softcap > 0"):
        Head(case.head.weight, softcap=0.0)


def test_no_more_than_a_chunk_of_logits_is_ever_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = chunked.Layer.write
    monkeypatch.setattr(chunked.Layer, "write", lambda self, h, z: (sizes.append(z.shape), original(self, h, z)))
    Case.make((11, 8)).chunked(PLAIN, 4)
    assert sizes == [(4, 8), (4, 8)] * 2 + [(3, 8), (3, 8)]
