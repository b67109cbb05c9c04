"""Losses and gradients that are NaN or infinite: an error before the step, or a step left out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from toys import EXACT, Duel, Killed, Numbers, Regression, rows, same, saved, stopping_after, train, weights

from stepdistill.batch import Batch
from stepdistill.data.order import indices
from stepdistill.method import Losses, Phase
from stepdistill.randomness import StepRandom
from stepdistill.training.optimization import NonFinite, NonFiniteError


class Broken(Duel):
    """On its third step one of these is NaN: the loss, or the critic's gradient of a finite loss, or a metric."""

    def __init__(self, what: str) -> None:
        super().__init__(every=1)
        self.what = what

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("student", "critic"), self.both),)

    def both(self, batch: Batch) -> Losses:
        x0 = batch.data()
        loss = (self.student(x0) - x0).square().mean() + self.critic(x0).square().mean()
        bad = self.step == 2
        nothing = (0.0 * self.critic(x0).sum()).sqrt() if bad and self.what == "gradient" else 0.0  # sqrt'(0) * 0
        metric = torch.tensor(math.nan if bad and self.what == "metric" else 1.0)
        factor = {"loss": math.nan, "infinite": math.inf}.get(self.what, 1.0) if bad else 1.0
        return Losses({"sum": loss * factor + nothing}, {"metric": metric}, count=len(batch))


@pytest.mark.parametrize(
    ("what", "named"), [("loss", "loss"), ("infinite", "loss"), ("gradient", "gradient norm of critic")]
)
def test_what_is_not_finite_raises_before_the_step(tmp_path: Path, what: str, named: str) -> None:
    good = train(tmp_path / "two", Broken(what), max_train_steps=2)
    method = Broken(what)
    with pytest.raises(NonFiniteError, match=f"{named}.*is not finite at step 3.*learning_rate"):
        train(tmp_path / "three", method, max_train_steps=5, train_batch_size=4, gradient_accumulation_steps=2)
    # 2x4 and 1x8 differ in rounding alone, and neither role moved, the student whose gradient was fine included
    assert_close(weights(method), weights(good), rtol=1e-4, atol=1e-6)
    assert [row["step"] for row in rows(tmp_path / "three")] == [1, 2]
    assert all(p.requires_grad for net in method.networks().values() for p in net.trainable())


def test_a_metric_that_is_not_a_number_is_only_told(tmp_path: Path) -> None:
    train(tmp_path, Broken("metric"), max_train_steps=4)
    assert [row["metric"] for row in rows(tmp_path)] == [1.0, 1.0, None, 1.0]


class Holes(Numbers):
    """Some samples are NaN."""

    def __init__(self, *holes: int) -> None:
        super().__init__()
        self.x0[list(holes)] = math.nan


def test_the_message_names_the_samples_of_the_micro_batch(tmp_path: Path) -> None:
    step, position, size = 2, 5, 8
    hole, mates = indices(0, step, [position], size, 64)[0], indices(0, step, [4, 5], size, 64)
    with pytest.raises(
        NonFiniteError, match=rf"at step 3 .*samples {mates[0]}, {mates[1]} of the data set.*on_nonfinite skip"
    ):
        train(tmp_path, Regression(), Holes(hole), train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(NonFiniteError, match=r"samples (\d+, ){8}\.\.\. of the data set"):
        train(tmp_path / "large", Regression(), Holes(hole), train_batch_size=16)


class Skipping(Regression):
    """Keeps what after_step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, Any] = {}

    def after_step(self) -> None:
        super().after_step()
        self.states[self.step] = weights(self)


def hole_at(*steps: int) -> Holes:
    return Holes(*[indices(0, step, [3], 8, 64)[0] for step in steps])


SKIP = {"on_nonfinite": "skip", "ema_decay": 0.9}


def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = Skipping()
    train(tmp_path / "run", method, hole_at(2, 3), max_train_steps=6, **SKIP)
    assert sorted(method.states) == [0, 1, 4, 5], "no after_step, and the global step counts on"
    found = rows(tmp_path / "run")
    assert [row["skipped"] for row in found] == [0, 0, 1, 2, 2, 2] and [row["step"] for row in found] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert [row["loss"] is None for row in found] == [False, False, True, True, False, False]
    assert caplog.text.count("step left out") == 2
    # the steps that were made are those of a run by hand, averages and moments included
    tensors, state = saved(tmp_path / "run")
    assert state["left_out"] == [2, 0] and state["ema_updates"] == 4
    by_hand, data = Regression(), Numbers()
    optimizer = torch.optim.AdamW(by_hand.student.trainable(), lr=1e-2)
    for step in (0, 1, 4, 5):
        loss = by_hand.training_step(data.batch(indices(0, step, range(8), 8, 64), StepRandom(0, step, range(8))))
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.student.trainable(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_close({n: v for n, v in tensors.items() if n.startswith("student/")}, weights(by_hand), rtol=1e-6, atol=1e-7)
    steps = [v for n, v in tensors.items() if n.startswith("student.optimizer/") and n.endswith("step")]
    assert_close(steps, [torch.tensor(4.0)] * 4, **EXACT)


class Sour(Broken):
    """The critic learns alone first; on step 3 the loss of both, or the critic's gradient of it, is not finite."""

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("critic",), self.alone), Phase(("student", "critic"), self.both))

    def alone(self, batch: Batch) -> Losses:
        return Losses({"alone": self.critic(batch.data()).square().mean()}, count=len(batch))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_role_of_the_phase_steps_and_other_phases_do(tmp_path: Path, what: str) -> None:
    method, moved = Sour(what), []
    before: dict[str, torch.Tensor] = {}
    original = method.both

    def both(batch: Batch) -> Losses:
        before.update(weights(method))
        return original(batch)

    method.both = both
    critic = weights(method)
    method.after_step = lambda: moved.append(method.step)
    train(tmp_path, method, max_train_steps=3, on_nonfinite="skip")
    assert moved == [0, 1]
    assert_close(weights(method), before, **EXACT)
    assert not torch.equal(before["critic/0.weight"], critic["critic/0.weight"])
    assert all(p.grad is None for net in method.networks().values() for p in net.trainable())
    last = rows(tmp_path)[-1]
    assert last["skipped"] == 1 and last["loss/critic"] > 0 and ("grad_norm/student" in last) == (what == "gradient")


def test_it_gives_up_after_too_many_in_a_row_also_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NonFinite, "LIMIT", 4)
    data, changes = hole_at(1, 3, 4, 5, 6), {"max_train_steps": 10, "checkpointing_steps": 1, **SKIP}
    method = Regression()
    with stopping_after(method, 3, Killed.now), pytest.raises(Killed):
        train(tmp_path / "run", method, data, **changes)
    for _ in range(2):  # the fourth in a row is step 7; a row it may not have, and it never gets beyond
        with pytest.raises(NonFiniteError, match=r"4 steps in a row.*loss.*not finite at step 7"):
            train(tmp_path / "run", Regression(), data, resume_from_checkpoint="latest", **changes)
        assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 1, 1, 2, 3, 4]
    assert saved(tmp_path / "run")[1]["left_out"] == [4, 3]


def test_a_killed_run_with_steps_left_out_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    changes = {"max_train_steps": 8, "checkpointing_steps": 2, **SKIP}
    train(tmp_path / "whole", Regression(), hole_at(1, 3, 4), **changes)
    method = Regression()
    with stopping_after(method, 6, Killed.now), pytest.raises(Killed):
        train(tmp_path / "run", method, hole_at(1, 3, 4), **changes)
    train(tmp_path / "run", Regression(), hole_at(1, 3, 4), resume_from_checkpoint="latest", **changes)
    same(tmp_path / "run", tmp_path / "whole")
