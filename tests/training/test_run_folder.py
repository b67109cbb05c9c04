"""Whose the run folder is, whether it has room, and what a resumed run may change of its config."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ladders import ladder
from toys import Duel, Killed, Numbers, Regression, network, options, rows, saved, stopping_after, train

from stepdistill.errors import InputError
from stepdistill.training import folder as run_folder
from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.config import binding, flat_yaml, resumed_changes
from stepdistill.training.folder import on_main
from stepdistill.training.snapshot import room
from stepdistill.training.trainer import Trainer

fcntl = pytest.importorskip("fcntl")

# -- whose it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leftover", ["checkpoints", "metrics.jsonl"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path, leftover: str) -> None:
    (tmp_path / leftover).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="resume_from_checkpoint latest"):
        Trainer(options(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


LOCKER = """
    import sys, time
    from pathlib import Path
    from stepdistill.training.folder import RunFolder
    RunFolder(Path(sys.argv[1]), "", False).begin()
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LOCKER), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"{tmp_path / 'run'}.*in use by process {other.pid} on"):
            Trainer(options(), tmp_path / "run")
        other.kill()
    train(tmp_path / "run")  # kill -9 leaves no stale lock
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_one_process_may_come_back_to_its_folder_and_after_it_was_removed(tmp_path: Path) -> None:
    train(tmp_path / "run")
    train(tmp_path / "run", resume_from_checkpoint="latest")
    shutil.rmtree(tmp_path / "run")
    train(tmp_path / "run")
    with (tmp_path / "run" / ".lock").open() as again, pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    train(tmp_path / "run")
    assert (
        "can't be locked" in caplog.text and str(tmp_path / "run") in caplog.text and len(rows(tmp_path / "run")) == 6
    )


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_folder_that_can_not_be_made_is_an_input_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="fix --output_dir"):
        train(tmp_path / where)


def test_a_new_folder_is_made_by_the_fit_and_looked_at_again(tmp_path: Path) -> None:
    """Another run may have begun and ended there while this one prepared."""
    first, second = Trainer(options(), tmp_path / "run"), Trainer(options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    first.fit(Regression(), Numbers(), "a")
    before = rows(tmp_path / "run")
    with pytest.raises(InputError, match="holds a run"):
        second.fit(Regression(), Numbers(), "a")
    assert rows(tmp_path / "run") == before
    first.fit(Regression(), Numbers(), "b")  # its own


class Ranks:
    """An accelerator of two processes, seen from one of them."""

    num_processes, device = 2, "cpu"

    def __init__(self, rank: int, failed: float) -> None:
        self.is_main_process, self.failed = rank == 0, failed

    def reduce(self, flag: Any, reduction: str) -> Any:
        assert reduction == "sum"
        return flag + (self.failed if not self.is_main_process else 0.0)


def test_all_processes_learn_of_a_failure_on_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Any]] = []

    def broadcast(objects: list[Any]) -> list[Any]:
        sent.append(objects)
        return ["the disk is full"]

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    with pytest.raises(OSError, match="the disk is full"):
        on_main(Ranks(0, 0.0), lambda: raises(OSError("the disk is full")))
    with pytest.raises(InputError, match="the disk is full"):
        on_main(Ranks(1, 1.0), lambda: raises(AssertionError("not here")))
    assert sent == [["the disk is full"], [None]]
    on_main(Ranks(0, 0.0), list)
    on_main(Ranks(1, 0.0), lambda: raises(AssertionError("not here")))
    assert len(sent) == 2


def raises(error: Exception) -> None:
    raise error


def test_processes_that_do_not_see_one_folder_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(options(), tmp_path)
    trainer.accelerator.gather = lambda step: torch.cat([step, step + 4])
    with pytest.raises(InputError, match=r"got steps \[0, 4\]; put --output_dir on a file system that all nodes share"):
        trainer.fit(Regression(), Numbers())


# -- room -------------------------------------------------------------------------------------------------------------


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


@pytest.mark.parametrize("make", [Regression, Duel])
def test_the_room_that_is_asked_for_is_that_of_the_checkpoints(tmp_path: Path, make: Callable[[], Any]) -> None:
    asked: list[tuple[int, int]] = []
    method = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.training.loop.check_space", lambda _folder, *args: asked.append(args))
        train(tmp_path, method, ema_decay=0.9, max_train_steps=8, checkpointing_steps=2)
        train(
            tmp_path, make(), ema_decay=0.9, max_train_steps=10, checkpointing_steps=2, resume_from_checkpoint="latest"
        )
    written = sum(tensor.nbytes for tensor in saved(tmp_path)[0].values())
    # before the first step without the optimizers' step counts, four bytes each
    assert written - 4 * 2 * 4 <= asked[0][0] < written and asked[1] == (written, 1)
    assert asked[0][1] == 3, "two are kept while a third is written"


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("rungs", "given"), [((4, 2, 1), True), ((4, 2, 1), False), ((4,), True)])
def test_the_room_for_a_teacher_that_a_later_rung_adds(
    tmp_path: Path, kind: str, rungs: tuple[int, ...], given: bool
) -> None:
    """What is asked for before the first rung is what a checkpoint of the last one takes."""
    asked: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.training.loop.check_space", lambda _folder, *args: asked.append(args))
        train(tmp_path, ladder(kind, given, rungs=rungs), max_train_steps=2)
    tensors = saved(tmp_path)[0]
    assert any(name.startswith("teacher/") for name in tensors) == (len(rungs) > 1 or not given)
    counts = 4 * sum(name.endswith(".step") for name in tensors)
    assert [size for size, _ in asked] == [sum(tensor.nbytes for tensor in tensors.values()) - counts]


@pytest.mark.parametrize(
    ("limit", "steps", "kept", "copies"), [(2, 1, 0, 1), (3, 9, 0, 4), (3, 9, 3, 1), (3, 9, 2, 2), (None, 9, 2, 5)]
)
def test_how_many_checkpoints_there_will_be_at_once(limit: int | None, steps: int, kept: int, copies: int) -> None:
    fit: Any = SimpleNamespace(
        networks={"student": network(0)}, roles={}, ema=None, method=Regression(), start=10, steps=steps,
        trainer=SimpleNamespace(step=10), config=options(checkpointing_steps=2),
        store=SimpleNamespace(limit=limit, steps=lambda: list(range(kept))),
    )  # fmt: skip
    assert room(fit)[1] == copies


def test_no_room_for_a_checkpoint_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 700)
    with pytest.raises(InputError, match=r"room for a checkpoint.*0.0007 MB free.*output_dir"):
        train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_room_for_some_of_the_checkpoints_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free(monkeypatch, 2000)
    train(tmp_path / "short")
    assert not caplog.text
    train(tmp_path / "long", checkpointing_steps=1)
    assert "3 checkpoints of about" in caplog.text and "checkpoints_total_limit" in caplog.text


# -- a resumed run's config -------------------------------------------------------------------------------------------

CONFIG = """
teacher: {path: demo, revision: null}
student: {rank: 64, targets: null}
data: {path: demo, cache_dir: null, encode_batch_size: 16}
method: {w_min: 5.0}
export: {dtype: fp32}
output_dir: out
"""


def changed(old: str, new: str) -> list[str]:
    assert old in CONFIG
    return resumed_changes(binding(flat_yaml(CONFIG)), binding(flat_yaml(CONFIG.replace(old, new))), "there")


@pytest.mark.parametrize(
    ("old", "new"),
    [("dtype: fp32", "dtype: fp16"), ("output_dir: out", "output_dir: moved"), ("cache_dir: null", "cache_dir: x"),
     ("encode_batch_size: 16", "encode_batch_size: 4"), ("{path: demo, revision", "{path: moved, revision"), ("5.0", "5")],
)  # fmt: skip
def test_free_changes_are_not_even_said(old: str, new: str) -> None:
    assert changed(old, new) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("rank: 64", "rank: 8", "student.rank: 64 -> 8"), ("targets: null", "targets: x", "student.targets: None -> x"),
     ("data: {path: demo", "data: {path: x", "data.path: demo -> x"), ("5.0", "5.5", "method.w_min: 5.0 -> 5.5"),
     ("revision: null", "revision: main", "teacher.revision: None -> main")],
)  # fmt: skip
def test_what_makes_another_run_is_refused(old: str, new: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"config of there, got changes \({said}\).*another --output_dir"):
        changed(old, new)


def test_all_that_is_refused_is_listed() -> None:
    with pytest.raises(InputError, match=r"\(a.x: 1 -> 2, train.ema_decay: 0.9 -> 0.8, train.seed: 0 -> 1\)"):
        resumed_changes(
            {"a.x": 1, "train.seed": 0, "train.ema_decay": 0.9, "train.adam_beta1": 0.1},
            {"a.x": 2, "train.seed": 1, "train.ema_decay": 0.8, "train.adam_beta1": 0.2}, "there",
        )  # fmt: skip


def test_what_another_version_does_not_know_is_said() -> None:
    assert resumed_changes({"a": 1, "b": 2}, {"b": 2, "c": 3}, "there") == ["a: 1 -> (unknown)", "c: (unknown) -> 3"]
    assert resumed_changes({}, {"a": 1}, "there") == resumed_changes({"a": 1}, {}, "there") == []


def test_a_resumed_run_says_what_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, max_train_steps=2)
    capsys.readouterr()
    again = {
        "max_train_steps": 4,
        "resume_from_checkpoint": "latest",
        "gradient_accumulation_steps": 2,
        "train_batch_size": 4,
    }
    train(tmp_path, learning_rate=1e-3, max_grad_norm=float("inf"), checkpointing_steps=3, **again)
    said = [line for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert said == [
        "changed since step 2: train.learning_rate: 0.01 -> 0.001",
        "changed since step 2: train.max_grad_norm: 1.0 -> inf",
    ]
    train(tmp_path, learning_rate=1e-3, max_grad_norm=float("inf"), **again | {"max_train_steps": 5})
    assert "->" not in capsys.readouterr().out


def test_another_config_is_refused_before_anything_is_prepared_and_at_the_checkpoint(tmp_path: Path) -> None:
    Trainer(options(max_train_steps=2), tmp_path, CONFIG).fit(Regression(), Numbers())
    again, other = options(max_train_steps=4, resume_from_checkpoint="latest"), CONFIG.replace("64", "8")
    with pytest.raises(InputError, match=r"config.yaml, got changes \(student.rank: 64 -> 8\)"):
        Trainer(again, tmp_path, other)
    (tmp_path / "config.yaml").write_text("{")  # damaged, or somebody's: the checkpoint knows
    with pytest.raises(InputError, match=r"checkpoints/2, got changes \(student.rank: 64 -> 8\)"):
        Trainer(again, tmp_path, other).fit(Regression(), Numbers())
    Trainer(again, tmp_path, CONFIG).fit(Regression(), Numbers())
    assert len(rows(tmp_path)) == 4 and (tmp_path / "config.yaml").read_text() == CONFIG


def test_a_run_killed_before_its_first_checkpoint_binds_nobody(tmp_path: Path) -> None:
    method = Regression()
    with stopping_after(method, 2, Killed.now), pytest.raises(Killed):
        Trainer(options(), tmp_path, CONFIG).fit(method, Numbers())
    other = CONFIG.replace("64", "8")
    Trainer(options(resume_from_checkpoint="latest"), tmp_path, other).fit(Regression(), Numbers())
    assert (tmp_path / "config.yaml").read_text() == other


# -- going back -------------------------------------------------------------------------------------------------------


def test_going_back_sets_later_checkpoints_aside_before_the_next_step(tmp_path: Path) -> None:
    train(tmp_path, checkpointing_steps=2)
    method = Regression()
    with stopping_after(method, 5, Killed.now), pytest.raises(Killed):
        train(tmp_path, method, checkpointing_steps=2, resume_from_checkpoint="4")
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [4] and [r["step"] for r in rows(tmp_path)] == [
        1,
        2,
        3,
        4,
    ]
    assert (tmp_path / "checkpoints" / "abandoned-6" / "manifest.json").is_file()
    train(tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    train(tmp_path / "whole", checkpointing_steps=2)
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_an_error_where_that_is_asked_for(tmp_path: Path) -> None:
    train(tmp_path, checkpointing_steps=2)
    (tmp_path / "checkpoints" / "6" / "student.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"student.safetensors \(missing\)"):
        train(tmp_path, resume_from_checkpoint="latest", resume_strict=True)
    assert sorted(tmp_path.rglob("*")) == before
    train(tmp_path, resume_from_checkpoint="latest")
