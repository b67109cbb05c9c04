"""What a fit is made of: averages, validation, rounds, several fits in a run, its folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from toys import (
    EXACT,
    Duel,
    Killed,
    Ladder,
    Numbers,
    Regression,
    options,
    rows,
    same,
    saved,
    stopping_after,
    train,
    weights,
)  # fmt: skip

from stepdistill.batch import Batch
from stepdistill.errors import InputError
from stepdistill.method import Losses, Method, Phase
from stepdistill.networks.network import Network
from stepdistill.training.config import TrainConfig
from stepdistill.training.optimization import lr_factor
from stepdistill.training.trainer import Trainer


def test_the_average_is_what_is_validated_and_what_remains(tmp_path: Path) -> None:
    method, trained, shown = Regression(), [], []
    original = method.after_step
    method.after_step = lambda: (original(), trained.append(weights(method)))[0]
    start = weights(method)
    config = options(ema_decay=0.5, validation_steps=2, max_train_steps=5)
    Trainer(config, tmp_path).fit(method, Numbers(), on_validate=lambda step: shown.append((step, weights(method))))
    average, averages = start, []
    for n, now in enumerate(trained):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
        averages.append(average)
    assert [step for step, _ in shown] == [2, 4]
    assert_close(shown[0][1], averages[1], rtol=1e-5, atol=1e-6)
    assert_close(shown[1][1], averages[3], rtol=1e-5, atol=1e-6)
    assert_close(weights(method), averages[4], rtol=1e-5, atol=1e-6)
    tensors, _ = saved(tmp_path)
    assert_close({n: v for n, v in tensors.items() if n.startswith("student/")}, trained[4], **EXACT)
    assert_close({n.replace(".ema", ""): v for n, v in tensors.items() if ".ema" in n}, weights(method), **EXACT)


def test_validation_does_not_touch_training(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", Regression(dropout=0.5), ema_decay=0.9)
    method, asked = Regression(dropout=0.5), []

    def on_validate(step: int) -> None:
        asked.append((step, torch.is_grad_enabled()))
        torch.manual_seed(step)
        torch.rand(step)

    Trainer(options(validation_steps=2, ema_decay=0.9), tmp_path / "told").fit(
        method, Numbers(), on_validate=on_validate
    )
    assert asked == [(2, False), (4, False), (6, False)]
    assert_close(weights(method), weights(plain), **EXACT)


def test_a_round_starts_afresh(tmp_path: Path) -> None:
    method, ends = Ladder(), []
    config = options(
        max_train_steps=3, ema_decay=0.5, lr_scheduler="linear", learning_rate=0.3, checkpoints_total_limit=None
    )
    Trainer(config, tmp_path).fit(method, Numbers(), on_round=lambda n: ends.append((n, weights(method))))
    assert [n for n, _ in ends] == [0, 1, 2]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10)), "the global step counts on"
    assert_close([row["learning_rate"] for row in rows(tmp_path)], [0.3, 0.2, 0.1] * 3, rtol=1e-12, atol=0)
    tensors, state = saved(tmp_path)
    assert (state["round"], state["round_start"], state["ema_updates"]) == (2, 6, 3)
    steps = [v for n, v in tensors.items() if n.startswith("student.optimizer/") and n.endswith("step")]
    assert_close(steps, [torch.tensor(3.0)] * 4, **EXACT)
    # the teacher of round 2 is the average that round 1 ended with, which on_round was shown
    student = {n: v for n, v in ends[1][1].items() if n.startswith("student")}
    assert_close(
        {n.replace("teacher", "student"): v for n, v in weights(method).items() if "teacher" in n}, student, **EXACT
    )


class Growing(Ladder):
    """Its teacher, which is the student, becomes a network of its own at the end of the first round."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = self.student

    def networks(self) -> dict[str, Network]:
        return super().networks() if self.rung < 3 else {"student": self.student}

    def next_round(self) -> bool:
        if self.rung == 3:
            self.teacher = self.student.frozen_copy()
        return super().next_round()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.rung < 3:
            self.teacher = self.student.frozen_copy()


def test_a_role_that_a_later_round_brings_is_saved_and_restored(tmp_path: Path) -> None:
    changes = {"max_train_steps": 3, "checkpointing_steps": 2, "ema_decay": 0.5}
    whole = train(tmp_path / "whole", Growing(), **changes)
    for step in (2, 5, 9):
        method = Growing()
        with stopping_after(method, step, Killed.now), pytest.raises(Killed):
            train(tmp_path / str(step), method, **changes)
        roles = {name.split("/")[0] for name in saved(tmp_path / str(step))[0]} if step > 2 else set()
        assert ("teacher" in roles) == (step > 2)
        resumed = train(tmp_path / str(step), Growing(), resume_from_checkpoint="latest", **changes)
        same(tmp_path / str(step), tmp_path / "whole")
        assert_close(weights(resumed), weights(whole), **EXACT)
    assert any(name.startswith("teacher/") for name in weights(whole))


def test_fits_follow_each_other_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    def run(resume: str | None, second_steps: int, stop: int | None = None) -> tuple[Method, Method, list[str]]:
        first, second, log = Regression(seed=1), Duel(seed=2), []
        config = options(max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint=resume, ema_decay=0.5)
        trainer = Trainer(config, tmp_path)
        first.training_step = spy(first.training_step, log, "first")
        second.criticise = spy(second.criticise, log, "second")
        trainer.fit(first, Numbers(), "warm_up", on_round=lambda n: log.append(f"round {n}"))
        if stop is None:
            trainer.fit(second, Numbers(), "ladder", steps=second_steps)
        else:
            with stopping_after(second, stop, Killed.now), pytest.raises(Killed):
                trainer.fit(second, Numbers(), "ladder", steps=second_steps)
        return first, second, log

    first, _, log = run(None, 5, stop=8)
    assert log == ["first"] * 4 + ["round 0"] + ["second"] * 4
    again, _, log = run("latest", 5)
    assert log == ["round 0"] + ["second"] * 3, "steps 7, 8, 9 of the second, none of the first"
    assert_close(weights(again), weights(first), **EXACT)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    _, _, log = run("latest", 5)
    assert log == ["round 0"], "nothing is left to do, and nothing that was told is taken back"
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["ladder", "warm_up"]


def spy(function: Any, log: list[str], word: str) -> Any:
    def called(batch: Batch) -> Losses:
        log.append(word)
        return function(batch)

    return called


def test_the_names_of_fits(tmp_path: Path) -> None:
    trainer = Trainer(options(max_train_steps=1), tmp_path)
    trainer.fit(Regression(), Numbers(), "a")
    with pytest.raises(ValueError, match="'a' already"):
        trainer.fit(Regression(), Numbers(), "a")
    with pytest.raises(ValueError, match="no number"):
        trainer.fit(Regression(), Numbers(), "12")


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one sample"):
        train(tmp_path, Regression(), Numbers(count=0))


class Astray(Regression):
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("critic",), self.training_step),)


def test_a_phase_of_an_unknown_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['student'\], got \['critic'\]"):
        train(tmp_path, Astray())


def test_no_steps_are_no_steps(tmp_path: Path) -> None:
    method = Regression()
    Trainer(options(), tmp_path).fit(method, Numbers(), steps=0)
    assert_close(weights(method), weights(Regression()), **EXACT)


def test_the_config_lies_beside_the_run(tmp_path: Path) -> None:
    Trainer(options(max_train_steps=1), tmp_path / "run", "seed: 0\n").fit(Regression(), Numbers())
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"
    assert (tmp_path / "run" / "checkpoints" / "1" / "manifest.json").is_file()


def test_the_sizes_that_recipes_ask_for(tmp_path: Path) -> None:
    trainer = Trainer(options(train_batch_size=4, gradient_accumulation_steps=3), tmp_path)
    assert (trainer.global_batch_size, trainer.is_main, trainer.weight_dtype) == (12, True, torch.float32)
    assert trainer.device.type in ("cpu", "cuda", "mps")
    assert lr_factor(TrainConfig(), 0, 10) == 1.0
