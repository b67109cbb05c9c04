"""k likeliest tokens and the rest: by hand, against the whole vocabulary, and the closed gradients against autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.kd import chunked
from stepdistill.kd.chunked import Head, bucket_loss, chunked_loss
from stepdistill.kd.divergences import Divergence, Kind, log_probs
from stepdistill.kd.reduction import Objective, TokenLoss
from stepdistill.kd.targets import Asked, Buckets, bucketed, dense_bucket_loss

EXACT = {"rtol": 0, "atol": 0}
TIGHT = {"rtol": 0.0, "atol": 1e-12}
V, B, S = 11, 3, 5
DIVERGENCES = [Divergence(kind, 0.3, 0.2) for kind in get_args(Kind)] + [Divergence("jsd", 0.3, normalised=True)]


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(d: Divergence, z: Tensor, teacher: Tensor, k: int) -> Tensor:
    buckets = Buckets.of(Asked(teacher.shape[-1], k, d.temperature), teacher)
    return d.value(bucketed(log_probs(z, d.temperature), buckets.ids), buckets.log_probs)


def test_by_hand() -> None:
    """p = (.5, .1, .3, .1), q = (.2, .4, .3, .1), k = 2: tokens 0 and 2, and .2 against .5 for the rest."""
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.5, 0.1, 0.3, 0.1), (0.2, 0.4, 0.3, 0.1)))
    buckets = Buckets.of(Asked(4, 2), p)
    assert buckets.ids.tolist() == [0, 2] and buckets.entries == 4
    assert_close(buckets.log_probs.exp(), torch.tensor((0.5, 0.3, 0.2), dtype=torch.float64), **TIGHT)
    wanted = {
        "forward_kl": 0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(0.2 / 0.5),
        "reverse_kl": 0.2 * math.log(0.2 / 0.5) + 0.5 * math.log(0.5 / 0.2),
        "tvd": 0.3,
    }
    for kind, number in wanted.items():
        assert float(value(Divergence(kind), q, p, 2)) == pytest.approx(number, abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("d", DIVERGENCES, ids=str)
def test_never_above_the_whole_rising_with_k_and_equal_at_all_of_them(d: Divergence) -> None:
    z, teacher = drawn(400, V, seed=0, scale=3.0), drawn(400, V, seed=1, scale=3.0)
    whole = d.value(log_probs(z), log_probs(teacher))
    by_k = torch.stack([value(d, z, teacher, k) for k in range(1, V + 1)])
    assert bool((by_k >= -1e-12).all()) and bool((by_k <= whole + 1e-12).all())
    assert bool((by_k.diff(dim=0) >= -1e-12).all())
    assert_close(by_k[-1], whole, **EXACT)
    assert_close(by_k[-2], whole, **TIGHT)  # a rest of one token is that token
    assert bool((by_k[0] < whole - 1e-3).any()), "a bound that says something"


@dataclass(frozen=True)
class Case:
    """Inputs of a loss; the student's tensors require grad. 11 of 15 tokens are valid."""

    hidden: Tensor
    head: Head
    teacher: Tensor
    mask: Tensor
    labels: Tensor
    asked: Asked

    @classmethod
    def make(cls, k: int = 3, entries: int = V, softcap: float | None = None, temperature: float = 1.0) -> Case:
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[0, 3:] = mask[2, :2] = False
        bias = drawn(entries, seed=4).requires_grad_()
        return cls(
            drawn(B, S, 4, seed=0).requires_grad_(),
            Head(drawn(entries, 4, seed=1).requires_grad_(), bias, softcap),
            drawn(B, S, V, seed=2, scale=2.0),
            mask,
            torch.randint(entries, (B, S), generator=torch.Generator().manual_seed(6)),
            Asked(V, k, temperature),
        )

    @property
    def buckets(self) -> Buckets:
        return Buckets.of(self.asked, self.teacher)

    def chunked(self, objective: Objective, size: int = 4) -> TokenLoss:
        return bucket_loss(objective, self.hidden, self.head, self.buckets, self.mask, self.labels, size)

    def dense(self, objective: Objective) -> TokenLoss:
        return dense_bucket_loss(objective, self.head.logits(self.hidden), self.buckets, self.mask, self.labels)

    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None]

    def same(self, objective: Objective, size: int = 4) -> None:
        found, wanted = self.chunked(objective, size), self.dense(objective)
        assert found.count == wanted.count == 11
        assert_close([found.total, found.kd, found.ce], [wanted.total, wanted.kd, wanted.ce], **TIGHT)
        gradients = torch.autograd.grad(found.mean * 3.0, self.inputs())
        assert_close(gradients, torch.autograd.grad(wanted.mean * 3.0, self.inputs()), **TIGHT)

    def live(self, objective: Objective) -> TokenLoss:
        """Of a teacher whose logits are a product with the identity."""
        identity = Head(torch.eye(V, dtype=self.teacher.dtype))
        return chunked_loss(objective, self.hidden, self.head, self.teacher, identity, self.mask, self.labels, 4)


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
@pytest.mark.parametrize("d", DIVERGENCES, ids=str)
def test_closed_gradients_are_autograds(d: Divergence, k: int) -> None:
    Case.make(k).same(Objective(d, 0.7))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("entries", [V, V + 4])
def test_with_a_cross_entropy_a_soft_cap_more_entries_and_a_temperature(entries: int, temperature: float) -> None:
    Case.make(3, entries, 3.0, temperature).same(Objective(Divergence("jsd", 0.3, temperature=temperature), 0.7, 0.4))


def test_without_a_divergence() -> None:
    Case.make().same(Objective(kd_weight=0.0, ce_weight=1.0))


@pytest.mark.parametrize("size", [1, 2, 5, 11, 1000])
@pytest.mark.parametrize("tile", [1, 23, 10_000])
def test_chunks_and_tiles(size: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CACHED", tile)
    Case.make().same(Objective(Divergence("reverse_kl"), 0.7, 0.4), size)


@pytest.mark.parametrize("d", DIVERGENCES, ids=str)
def test_all_of_the_vocabulary_is_the_live_teacher_to_the_bit(d: Divergence) -> None:
    case = Case.make(V)
    single = [x.detach().float().requires_grad_() for x in case.inputs()]
    case = replace(case, hidden=single[0], head=Head(*single[1:]), teacher=case.teacher.float())
    found, wanted = case.chunked(Objective(d, 0.7, 0.4)), case.live(Objective(d, 0.7, 0.4))
    assert_close([found.total, found.kd, found.ce], [wanted.total, wanted.kd, wanted.ce], **EXACT)
    assert_close(
        torch.autograd.grad(found.total, case.inputs()), torch.autograd.grad(wanted.total, case.inputs()), **EXACT
    )


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("d", DIVERGENCES, ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(d: Divergence, k: int) -> None:
    case = Case.make(k)
    case = replace(case, teacher=case.head.logits(case.hidden).detach())
    found = case.chunked(Objective(d))
    assert abs(float(found.total.detach())) < 1e-13
    if d.kind != "tvd":  # its gradient jumps there
        assert all(float(g.abs().max()) < 1e-13 for g in torch.autograd.grad(found.total, case.inputs()))


def test_a_small_rest_keeps_its_digits() -> None:
    """1 - sum q of float32 has none of them where the rest weighs 1e-12."""
    z = torch.tensor([[20.0, 19.0, -8.0, -9.0, -10.0]])
    ids = torch.tensor([[0, 1]])
    wanted = bucketed(log_probs(z.double()), ids)
    assert_close(bucketed(log_probs(z), ids).double(), wanted, rtol=1e-6, atol=0.0)
    p = Buckets(Asked(5, 2), ids, torch.tensor([[0.5, 0.25, 0.25]]).log())
    d = Divergence("forward_kl")
    found = p.chosen(torch.arange(1), torch.float32).compare(d, z.clone(), slice(0, 1), True)
    exact = Buckets(p.asked, ids, p.log_probs.double()).compare(d, z.double(), slice(0, 1), True)
    assert_close(found.value.double(), exact.value, rtol=1e-6, atol=0.0)
    assert_close(found.gradient.double(), exact.gradient, rtol=1e-5, atol=1e-12)  # type: ignore[union-attr]
    assert_close(found.log_q, log_probs(z), **EXACT)


def test_half_precision_is_a_distribution_again() -> None:
    """Rounded log-probabilities sum to something else, which would make a divergence negative."""
    teacher = drawn(200, 1000, seed=1, scale=2.0).float()
    wide = Buckets.of(Asked(1000, 64), teacher)
    half = Buckets(wide.asked, wide.ids, wide.log_probs.half())
    assert float((half.log_probs.float().exp().sum(1) - 1).abs().max()) > 1e-4
    rows = torch.arange(200)
    stored, exact = (b.chosen(rows, torch.float64).log_probs for b in (half, wide))
    assert_close(stored.exp().sum(1), torch.ones(200, dtype=torch.float64), **TIGHT)
    assert float(Divergence().value(stored, exact).max()) < 2e-6
    assert_close(exact, wide.log_probs.double(), **EXACT)


def test_what_a_masked_token_holds_is_never_looked_at() -> None:
    case, objective = Case.make(), Objective(Divergence("jsd"), 0.7, 0.4)
    hidden = torch.where(case.mask[..., None], case.hidden, torch.nan).detach().requires_grad_()
    teacher = torch.where(case.mask[..., None], case.teacher, torch.nan)
    spoiled = replace(case, hidden=hidden, teacher=teacher)
    assert_close(spoiled.dense(objective).total, case.dense(objective).total, **EXACT)
    found, wanted = spoiled.chunked(objective).total, case.chunked(objective).total
    assert_close(found, wanted, **EXACT)
    gradients = torch.autograd.grad(found, spoiled.inputs())
    assert_close(gradients, torch.autograd.grad(wanted, case.inputs()), **EXACT)


def test_nothing_valid_is_zero_with_a_graph() -> None:
    case = Case.make()
    case = replace(case, mask=torch.zeros_like(case.mask))
    for found in (case.chunked(Objective()), case.dense(Objective())):
        assert found.count == 0 and found.total.item() == 0.0
        assert all(not g.any() for g in torch.autograd.grad(found.total, case.inputs()))


def test_without_gradients_only_values() -> None:
    case, objective = Case.make(temperature=2.0), Objective(Divergence(temperature=2.0))
    with torch.no_grad():
        assert_close(case.chunked(objective).total, case.dense(objective).total, **TIGHT)


@pytest.mark.parametrize("way", [Case.chunked, Case.dense])
def test_what_a_cache_does_not_know(way: Any) -> None:
    with pytest.raises(InputError, match=r"temperature 1, .*got 2.*3 likeliest.*--temperature"):
        way(Case.make(), Objective(Divergence(temperature=2.0)))
    with pytest.raises(InputError, match=r"temperature 2, .*got 1:"):
        way(Case.make(temperature=2.0), Objective())
    with pytest.raises(InputError, match=r"with the 11 entries.*got 9.*--vocabulary 9"):
        way(Case.make(entries=9), Objective())


@pytest.mark.parametrize("k", [0, 12])
def test_k_is_of_the_vocabulary(k: int) -> None:
    with pytest.raises(InputError, match=r"k in \[1, 11\].*--k"):
        Asked(11, k)
