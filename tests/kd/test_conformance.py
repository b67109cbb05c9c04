"""Ours passes every check, and each check can fail: wrong losses are told apart by the number that is theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.kd import adapters, cases, conformance
from stepdistill.kd.adapters import Adapter, Case, OursChunked, OursDense
from stepdistill.kd.conformance import CHECKS, Check, Outcome, examine


@pytest.mark.parametrize("make", [OursDense, OursChunked])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_ours_conforms(check: Check, make: type[Adapter]) -> None:
    if check.deviation is conformance.chunk_size and make is OursDense:
        pytest.skip("it has no chunks")
    assert check.deviation(make()) <= check.bound


class Wrong(OursChunked):
    """One that gets one thing wrong."""

    def __init__(self, change: Callable[..., Tensor] | None = None, **methods: Callable[..., Any]) -> None:
        self.change = change
        vars(self).update(methods)

    def loss(self, case: Case) -> Tensor:
        right = super().loss
        return right(case) if self.change is None else self.change(right, case)


Right = Callable[[Case], Tensor]


def by_chunks(right: Right, case: Case) -> Tensor:
    """A mean of means of chunks."""
    if case.chunk_size is None:
        return right(case)
    flat = {name: getattr(case, name).flatten(0, 1)[None] for name in ("student", "teacher", "mask")}
    chunks = {name: value.split(case.chunk_size, 1) for name, value in flat.items()}
    parts = [
        right(replace(case, student=s, teacher=t, mask=m))
        for s, t, m in zip(chunks["student"], chunks["teacher"], chunks["mask"], strict=True)
        if m.any()
    ]
    return torch.stack(parts).mean()


def padded_with_zeros(right: Right, case: Case) -> Tensor:
    missing = len(case.teacher_weight) - len(case.weight)
    more = case.weight.new_zeros(abs(missing), case.weight.shape[1])
    more_teacher = case.teacher_weight.new_zeros(abs(missing), case.teacher_weight.shape[1])
    if missing > 0:
        return right(replace(case, weight=torch.cat([case.weight, more])))
    return right(replace(case, teacher_weight=torch.cat([case.teacher_weight, more_teacher])))


class Rounded(torch.autograd.Function):
    """The identity, whose gradients are summed in bfloat16, a chunk after the other."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        return tuple(weight.clone() for _ in range(parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = torch.zeros_like(gradients[0])
        for gradient in gradients:
            total += gradient
        return total, None


def rounded_sums(right: Right, case: Case) -> Tensor:
    """Chunks whose gradients are summed in the precision of the inputs."""
    if case.chunk_size != 4 or case.student.dtype != torch.bfloat16:
        return right(case)
    parts = zip(*(x.split(4, 1) for x in (case.student, case.teacher, case.mask)), strict=True)
    weights = Rounded.apply(case.weight, case.mask.shape[1] // 4)
    found = [
        right(replace(case, student=s, teacher=t, mask=m, weight=w))
        for (s, t, m), w in zip(parts, weights, strict=True)
    ]
    return torch.stack(found).mean()


def last_rows(adapter: Any) -> Any:
    """The mask is not shifted."""

    def sequence_loss(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return adapter.loss(cases.logits_case(student, teacher, mask=mask))

    return sequence_loss


def entropy(right: Right, case: Case) -> Tensor:
    """A cross-entropy in the place of a divergence has the same gradient in the student, and is not zero."""
    p = torch.softmax(case.teacher @ case.teacher_weight.t(), -1)[case.mask]
    return right(case) - (p * p.log()).sum() / max(1, int(case.mask.sum()))


MISTAKES: dict[str, tuple[str, Any]] = {
    "half of it": ("JSD(0.5) and its gradients", Wrong(lambda right, c: right(c) / 2)),
    "beta turned round": ("JSD(0.1) and its gradients", Wrong(lambda right, c: right(replace(c, beta=1 - c.beta)))),
    "KLs turned round": ("beta = 0", Wrong(lambda right, c: right(replace(c, beta=1 - c.beta)))),
    "no reverse KL": ("beta = 1", Wrong(lambda right, c: right(replace(c, beta=min(c.beta, 0.999))))),
    "normalised": ("JSD(beta) / beta", Wrong(lambda right, c: right(c) / max(c.beta * (1 - c.beta), 1e-6))),
    "one beta": ("JSD(beta)(p, q)", Wrong(lambda right, c: right(replace(c, beta=0.2)))),
    "cross-entropy": ("zero loss", Wrong(entropy)),
    "no T squared": ("gradients keep their size", Wrong(lambda right, c: right(c) / c.temperature**2)),
    "mean of means": ("a mean over valid tokens", Wrong(lambda right, c: right(replace(c, items=None)))),
    "mean over places": (
        "more padding",
        Wrong(lambda right, c: right(replace(c, items=c.mask.numel()))),
    ),
    "first sample only": (
        "the order of samples",
        Wrong(
            lambda right, c: right(c) + 0.1 * right(replace(c, mask=c.mask & (torch.arange(len(c.mask)) < 1)[:, None]))
        ),
    ),
    "times the mask": ("what masked tokens hold", Wrong(lambda right, c: right(c) + 0.0 * c.student.sum())),
    "divided by none": ("a batch without", Wrong(lambda right, c: right(c) / c.mask.sum() * c.mask.sum())),
    "chunks' means": ("the chunk size", Wrong(by_chunks)),
    "sums in bfloat16": ("bfloat16 inputs", Wrong(rounded_sums)),
    "zeros for the student": ("a teacher with more", Wrong(padded_with_zeros)),
    "zeros for the teacher": ("a student with more", Wrong(padded_with_zeros)),
    "mask not shifted": ("row i learns", Wrong(sequence_loss=last_rows(OursDense()))),
    "mask by ids": (
        "a sample's end",
        Wrong(mask=lambda t, prompt, end: (t != end) & (torch.arange(t.shape[1]) >= prompt)),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_by_its_check(mistake: str) -> None:
    name, adapter = MISTAKES[mistake]
    (check,) = [c for c in CHECKS if c.name.startswith(name)]
    assert not check.deviation(adapter) <= check.bound


def test_every_check_has_a_mistake_that_it_finds() -> None:
    assert all(any(c.name.startswith(name) for name, _ in MISTAKES.values()) for c in CHECKS)
    assert len(MISTAKES) == len(CHECKS)


def test_what_a_library_raises_and_what_it_leaves_to_its_caller() -> None:
    def refuse(right: Right, case: Case) -> Tensor:
        if len(case.weight) != len(case.teacher_weight):
            raise RuntimeError("sizes differ\nmore of it")
        return right(case)

    def absent(*_: Any) -> Tensor:
        raise NotImplementedError

    found = {outcome.check: outcome for outcome in examine(Wrong(refuse, sequence_loss=absent, mask=absent))}
    assert sum(o.holds is False for o in found.values()) == 2 and sum(o.holds is None for o in found.values()) == 2
    raised = found["a teacher with more entries: the shared ones, renormalised"]
    assert raised.said == "raises RuntimeError: sizes differ" and raised.deviation is None


def test_lines_say_the_number() -> None:
    assert Outcome("a", 1e-5, 2e-3, "", False).line().split() == ["a", "FAILS", "2.00e-03", "(bound", "1e-05)"]
    assert Outcome("a", 1e-5, None, "", None).line().split(maxsplit=1) == ["a", "none of its own"]
    assert Outcome("a", 1e-5, None, "raises E: b", False).line().endswith("FAILS   raises E: b")


def test_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert conformance.main([]) == 0
    said = capsys.readouterr().out
    assert "stepdistill, dense (stepdistill " in said and f"{len(CHECKS)} hold, 0 fail" in said
    monkeypatch.setitem(adapters.LIBRARIES, "ours", (lambda: Wrong(lambda right, c: right(c) / 2),))  # type: ignore[dict-item]
    assert conformance.main(["--against", "ours"]) == 1


@pytest.mark.parametrize(("library", "package"), [("trl", "trl"), ("liger", "liger-kernel")])
def test_a_library_that_is_not_there(
    library: str, package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(adapters, "version", nowhere)
    monkeypatch.setattr(sys, "argv", ["conformance"])
    assert conformance.main(["--against", library]) == 2
    assert f"expected {package} to compare with" in capsys.readouterr().err
