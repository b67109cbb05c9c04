"""A ladder that is killed goes on in the right rung and step, to the same bits; and however a batch is cut it is the same."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import Net, Pushed, ladder
from ladders import config as ladder_config
from torch.testing import assert_close
from toys import EXACT, Killed, Numbers, options, same, saved, stopping_after, weights

from stepdistill.errors import InputError
from stepdistill.methods.guidance_distill import GuidanceDistill, GuidanceDistillConfig
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.lora import LoraSpec
from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.trainer import Trainer

TESTS = Path(__file__).resolve().parent.parent
STEPS = 3


def climb(folder: Path, method: Progressive, on_round: Any = None, **changes: Any) -> Progressive:
    train = {"max_train_steps": STEPS, "checkpointing_steps": 2, "lr_scheduler": "linear", **changes}
    Trainer(options(**train), folder).fit(method, Numbers(), on_round=on_round)
    return method


def dies_in_a_step(step: int) -> Callable[..., None]:
    def run(folder: Path, method: Progressive, **changes: Any) -> None:
        with stopping_after(method, step, Killed.now):
            climb(folder, method, **changes)

    return run


def dies_at_the_end(folder: Path, method: Progressive, **changes: Any) -> None:
    climb(folder, method, on_round=lambda number: Killed.now() if number == 1 else None, **changes)


def dies_in_the_change(folder: Path, method: Progressive, **changes: Any) -> None:
    original = method.next_round

    def next_round() -> bool:
        original()
        if method.rung == 2:
            raise Killed
        return True

    method.next_round = next_round  # type: ignore[method-assign]
    climb(folder, method, **changes)


def dies_in_the_checkpoint(folder: Path, method: Progressive, **changes: Any) -> None:
    original = CheckpointStore._commit

    def commit(*args: Any) -> None:
        if method.rung == 2:
            raise Killed
        original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "_commit", commit)
        climb(folder, method, **changes)


DEATHS = {
    "in the first rung": dies_in_a_step(3), "in the second rung": dies_in_a_step(5),
    "at the start of the third": dies_in_a_step(7), "in the third": dies_in_a_step(8),
    "at the end of the second": dies_at_the_end, "in the change": dies_in_the_change,
    "in the checkpoint": dies_in_the_checkpoint,
}  # fmt: skip
Whole = Callable[..., tuple[Path, Progressive]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The ladder that nothing kills, made once for each setting."""
    made: dict[Any, tuple[Path, Progressive]] = {}

    def get(kind: str, given: bool, ema: float | None) -> tuple[Path, Progressive]:
        if (kind, given, ema) not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[kind, given, ema] = folder, climb(folder, ladder(kind, given), ema_decay=ema)
        return made[kind, given, ema]

    return get


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize(
    ("kind", "given", "ema"),
    [("full", True, 0.5), ("full", True, None), ("full", False, 0.5), ("lora", True, 0.5), ("lora", False, None)],
)
def test_killed_and_resumed_is_the_same(
    tmp_path: Path, whole: Whole, kind: str, given: bool, ema: float | None, death: str
) -> None:
    with pytest.raises(Killed):
        DEATHS[death](tmp_path, ladder(kind, given), ema_decay=ema)
    rungs: list[int] = []
    method = ladder(kind, given)
    resumed = climb(
        tmp_path, method, on_round=lambda _: rungs.append(method.steps), ema_decay=ema, resume_from_checkpoint="latest"
    )
    folder, wanted = whole(kind, given, ema)
    same(tmp_path, folder)
    assert_close(weights(resumed), weights(wanted), **EXACT)
    assert_close(resumed.teacher.state(), wanted.teacher.state(), **EXACT)
    assert rungs[-1] == 1 and rungs == [4, 2, 1][-len(rungs) :]
    if death in ("in the third", "at the start of the third"):
        assert rungs == [1], "a rung that another has followed is over"
    tensors, state = saved(tmp_path)
    assert state["method"] == {"ladder": [8, 4, 2, 1], "rung": 2} and any(n.startswith("teacher/") for n in tensors)


def test_a_finished_ladder_is_loaded_with_its_last_teacher(tmp_path: Path, whole: Whole) -> None:
    folder, wanted = whole("full", True, 0.5)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again, ends = ladder("full"), []
    climb(folder, again, on_round=ends.append, ema_decay=0.5, resume_from_checkpoint="latest")
    assert_close(weights(again), weights(wanted), **EXACT)
    assert ends == [2] and {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_another_ladder_does_not_go_on_with_it(whole: Whole) -> None:
    folder, _ = whole("full", True, 0.5)
    other = Progressive(ladder_config((4, 2), 8), Net().full_student(), Net())
    with pytest.raises(InputError, match=r"8, 4, 2, 1 of this checkpoint, got 8, 4, 2;.*start anew"):
        climb(folder, other, ema_decay=0.5, resume_from_checkpoint="latest")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_ladder_after_guidance_distillation_goes_on_without_it(tmp_path: Path, kind: str) -> None:
    """Two named fits on one student, as the recipe has them: the first is only loaded, whichever rung was reached."""

    def run(folder: Path, death: int = 0, **changes: Any) -> tuple[Progressive, list[int]]:
        config, steps = options(max_train_steps=STEPS, checkpointing_steps=2, ema_decay=0.5, **changes), []
        trainer, teacher = Trainer(config, folder), Net()
        student = teacher.full_student() if kind == "full" else teacher.with_lora(LoraSpec(2, 2.0, Net.lora_targets))
        first = GuidanceDistill(GuidanceDistillConfig(2.0, 2.0), student, teacher)
        original = first.training_step
        first.training_step = lambda batch: (steps.append(first.step), original(batch))[1]  # type: ignore[method-assign]
        trainer.fit(first, Pushed(), "guidance", steps=4)
        before = {n: v.clone() for n, v in student.state().items()}
        method = Progressive(ladder_config(w_min=2.0, w_max=2.0), student)
        assert_close(method.teacher.state(), before, **EXACT)
        with stopping_after(method, death, Killed.now):
            trainer.fit(method, Pushed(), "ladder")
        return method, steps

    whole, steps = run(tmp_path / "whole")
    assert steps == [0, 1, 2, 3]
    for death in (5, 4 + STEPS + 1, 4 + 2 * STEPS + 2):  # in the first, second and third rung
        with pytest.raises(Killed):
            run(tmp_path / str(death), death)
        resumed, steps = run(tmp_path / str(death), resume_from_checkpoint="latest")
        assert steps == []
        for name in ("guidance", "ladder"):
            assert_close(saved(tmp_path / str(death), name)[0], saved(tmp_path / "whole", name)[0], **EXACT)
        assert_close(weights(resumed), weights(whole), **EXACT)
    first, last = (saved(tmp_path / "whole", name)[0] for name in ("guidance", "ladder"))
    assert any(not torch.equal(first[n], last[n]) for n in first if n.startswith("student/"))


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_killed_with_9_in_the_third_rung_and_in_the_change_of_rungs(tmp_path: Path, kind: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(TESTS / "ladder_process.py"), kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-9] * 4 + [0, 0]
    same(tmp_path / "killed", tmp_path / "whole")
    assert saved(tmp_path / "killed")[1]["method"]["rung"] == 2
    # the first three ended at the end of the second rung, and the last in the third, after a step
    began = re.findall(r"^resuming from .* \(step (\d+)\)$", done.stdout, re.MULTILINE)
    assert began == ["8", "8", "8", "9"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_same_global_batch_in_other_parts_is_the_same_ladder(tmp_path: Path, kind: str) -> None:
    # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
    changes = {"ema_decay": 0.5, "adam_epsilon": 1e-3}
    at_once = climb(tmp_path / "1x8", ladder(kind), train_batch_size=8, **changes)
    in_parts = climb(tmp_path / "4x2", ladder(kind), train_batch_size=2, gradient_accumulation_steps=4, **changes)
    assert_close(weights(in_parts), weights(at_once), rtol=1e-4, atol=1e-6)
    assert set(weights(at_once)) >= {n.replace("student/", "teacher/") for n in weights(at_once)}
