"""The loop: what one step does in its phases. Fits are in test_fits.py, killing and resuming in test_resume.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from toys import (
    EXACT,
    Duel,
    Numbers,
    Regression,
    Uneven,
    rows,
    train,
    weights,
)  # fmt: skip

from stepdistill.batch import Batch
from stepdistill.method import Method, Phase
from stepdistill.randomness import StepRandom

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize("kind", [Regression, Uneven, Duel])
def test_accumulation_changes_nothing(tmp_path: Path, kind: type[Method]) -> None:
    """The same samples, noise, losses and weights whether 8 samples come as 1x8, 2x4, 4x2 or 8x1."""
    runs = []
    for size, parts in SPLITS:
        folder, data = tmp_path / f"{size}x{parts}", Numbers(count=20)
        method = train(
            folder, kind(), data, train_batch_size=size, gradient_accumulation_steps=parts, max_train_steps=8
        )
        runs.append((weights(method), rows(folder), [i for asked in data.asked for i in asked]))
    assert not torch.equal(next(iter(runs[0][0].values())), next(iter(weights(kind()).values())))
    for run in runs[1:]:
        assert_close(run[0], runs[0][0], rtol=1e-4, atol=1e-6)
        assert_close(run[1], runs[0][1], rtol=1e-4, atol=1e-6)
        assert run[2] == runs[0][2]


def test_means_over_items_are_true_means_over_the_global_batch(tmp_path: Path) -> None:
    """One step of plain descent, against the loss of all 8 samples at once: no mean of micro-batch means."""
    method, data = Uneven(), Numbers(count=8)
    items = torch.arange(8.0)
    errors = (method.student(data.x0) - data.x0).square().mean(1)
    whole = (errors * items).sum() / items.sum()
    whole.backward()
    norm = torch.cat([p.grad.flatten() for p in method.student.trainable()]).norm()
    method.student.module.zero_grad()
    train(tmp_path, method, data, train_batch_size=2, gradient_accumulation_steps=4, max_train_steps=1)
    (row,) = rows(tmp_path)
    assert_close(row["loss"], whole.item(), rtol=1e-6, atol=0)
    assert_close(row["grad_norm"], float(norm), rtol=1e-5, atol=0)


def test_a_row_of_metrics_for_each_step(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=4, lr_scheduler="linear", learning_rate=0.5)
    found = rows(tmp_path, timed=True)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in found] == [0.5, 0.375, 0.25, 0.125]
    for row in found:
        assert set(row) == {"step", "loss", "regression", "size", "grad_norm", "learning_rate", "seconds"}
        assert row["loss"] == row["regression"] and row["grad_norm"] > 0 and row["seconds"] >= 0


def test_every_epoch_shows_each_sample_once(tmp_path: Path) -> None:
    data = Numbers(count=12)
    train(tmp_path, Regression(), data, train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=3)
    seen = [i for asked in data.asked for i in asked]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


def test_the_steps_are_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    """Three steps by hand with torch's own optimizer."""
    clipping = {"max_grad_norm": 0.05, "adam_beta2": 0.9, "adam_epsilon": 0.1, "max_train_steps": 3}
    method = train(tmp_path, **clipping)
    other, data = Regression(), Numbers()
    optimizer = torch.optim.AdamW(other.student.trainable(), lr=1e-2, betas=(0.9, 0.9), eps=0.1, weight_decay=0.01)
    norms = []
    for asked, step in zip(trained_on(tmp_path / "again", clipping), range(3), strict=True):
        other.training_step(data.batch(asked, StepRandom(0, step, range(8)))).total.backward()
        norms.append(float(nn.utils.clip_grad_norm_(other.student.trainable(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(method), weights(other), rtol=1e-6, atol=1e-7)
    assert_close([row["grad_norm"] for row in rows(tmp_path)], norms, rtol=1e-5, atol=0)
    assert min(norms) > 0.05


def trained_on(folder: Path, changes: dict[str, Any]) -> list[tuple[int, ...]]:
    data = Numbers()
    train(folder, Regression(), data, **changes)
    return data.asked


class Global(Duel):
    """Draws from the global generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__(every=1)
        self.drawn: list[float] = []

    def _note(self, phase: str, batch: Batch) -> None:
        self.drawn.append(torch.rand(()).item())


def test_the_global_generator_is_another_in_each_step_phase_and_micro_batch(tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("once", 0), ("again", 0), ("seed", 1)):
        method = Global()
        changes = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "train_batch_size": 4, "seed": seed}
        train(tmp_path / name, method, **changes)
        drawn.append(method.drawn)
        torch.rand(7)
    assert len(set(drawn[0])) == 8 and drawn[1] == drawn[0]
    assert not set(drawn[2]) & set(drawn[0])


def test_phases_share_a_memo_and_run_as_often_as_they_say(tmp_path: Path) -> None:
    method = Duel(every=3)
    train(tmp_path, method, max_train_steps=4, train_batch_size=4, gradient_accumulation_steps=2)
    critic, student = [("critic", ("critic",), False)] * 2, [("student", ("student",), True)] * 2
    assert method.seen == [*critic, *student, *critic, *critic, *critic, *student]
    found = rows(tmp_path)
    assert [row["step"] for row in found if "fool" in row] == [1, 4]
    assert [row["step"] for row in found if "grad_norm/critic" in row] == [1, 2, 3, 4]
    assert all(row["loss"] == row.get("loss/student", row["loss/critic"]) for row in found)
    assert_close(found[0]["loss/student"], found[0]["fool"] + found[0]["size"], rtol=1e-5, atol=0)


def test_a_phase_moves_its_own_roles_and_leaves_no_gradients(tmp_path: Path) -> None:
    method = Duel(every=2)
    moved: list[set[str]] = []
    last = weights(method)

    def look() -> None:
        nonlocal last
        now = weights(method)
        moved.append({name.split("/")[0] for name in now if not torch.equal(now[name], last[name])})
        last = now
        assert all(p.grad is None for net in method.networks().values() for p in net.trainable())

    method.after_step = look
    train(tmp_path, method, max_train_steps=3)
    assert moved == [{"critic", "student"}, {"critic"}, {"critic", "student"}]


class Watched(Duel):
    """Looks at the other role's gradients during the backward of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []
        for role, net in self.networks().items():
            for parameter in net.trainable():
                parameter.register_hook(lambda _, role=role: self.touched.append(role))


def test_no_gradient_is_computed_for_frozen_roles(tmp_path: Path) -> None:
    method = Watched()
    train(tmp_path, method, max_train_steps=2)  # critic, student; critic
    # hooks fire once a backward: 4 parameters each, the critic's on both steps, the student's on the first
    assert method.touched == ["critic"] * 4 + ["student"] * 4 + ["critic"] * 4


class Recycled(Numbers):
    """A data set that hands out one Batch again and again."""

    def __init__(self) -> None:
        super().__init__(count=8)
        self.one: Batch | None = None

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        self.one = self.one or super().batch(range(8), rng)
        return self.one


def test_the_memo_ends_with_the_step(tmp_path: Path) -> None:
    method, data = Duel(every=1), Recycled()
    train(tmp_path, method, data, max_train_steps=2)
    assert [filled for _, _, filled in method.seen] == [False, True, False, True]
    assert data.one is not None and data.one.memo == {}


def test_flags_of_parameters_come_back(tmp_path: Path) -> None:
    method = Duel()
    frozen = method.student.module[0].bias.requires_grad_(False)
    method.student = type(method.student)(method.student.module)  # what trains is fixed at construction
    before, value = {n: p.requires_grad for n, p in flags(method)}, frozen.clone()
    train(tmp_path, method, max_train_steps=3)
    assert {n: p.requires_grad for n, p in flags(method)} == before
    assert_close(frozen, value, **EXACT)


def flags(method: Method) -> list[tuple[str, nn.Parameter]]:
    return [(f"{r}.{n}", p) for r, net in method.networks().items() for n, p in net.module.named_parameters()]


class Now_and_then(Regression):
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("student",), self.training_step, every=2),)


def test_a_step_without_a_phase_is_a_row_without_a_loss(tmp_path: Path) -> None:
    train(tmp_path, Now_and_then(), max_train_steps=3)
    assert ["loss" in row for row in rows(tmp_path)] == [True, False, True]
