"""A killed run goes on to the same bits, killed in this process at every kind of moment; test_killed.py has kill -9."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close
from toys import (
    EXACT,
    Duel,
    Killed,
    Ladder,
    Numbers,
    Regression,
    network,
    options,
    same,
    saved,
    stopping_after,
    train,
    weights,
)

from stepdistill.errors import InputError
from stepdistill.method import Method
from stepdistill.training.trainer import Trainer


@pytest.mark.parametrize("step", [1, 3, 4, 9])
@pytest.mark.parametrize("make", [lambda: Regression(dropout=0.3), Duel, Ladder])
def test_killed_in_a_step_and_resumed_is_the_same(tmp_path: Path, make: Callable[[], Method], step: int) -> None:
    changes = {"max_train_steps": 9, "checkpointing_steps": 2, "ema_decay": 0.9, "lr_scheduler": "linear"}
    if make is Ladder:
        changes |= {"max_train_steps": 4}
    whole = train(tmp_path / "whole", make(), **changes)
    method = make()
    with stopping_after(method, step, Killed.now), pytest.raises(Killed):
        train(tmp_path / "killed", method, **changes)
    resumed = train(tmp_path / "killed", make(), resume_from_checkpoint="latest", **changes)
    same(tmp_path / "killed", tmp_path / "whole")
    assert_close(weights(resumed), weights(whole), **EXACT)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("moment", ["on_round", "next_round", "first step"])
def test_killed_between_two_rounds_and_resumed_is_the_same(tmp_path: Path, moment: str) -> None:
    config = {"max_train_steps": 3, "ema_decay": 0.9}
    whole, ends = Ladder(dropout=0.3), []
    Trainer(options(**config), tmp_path / "whole").fit(whole, Numbers(), on_round=ends.append)
    method = Ladder(dropout=0.3)
    original, calls = method.next_round, []

    def on_round(number: int) -> None:
        if moment == "on_round" and number == 1:
            raise Killed

    def next_round() -> bool:
        more = original()
        calls.append(more)
        if moment == "next_round" and len(calls) == 2:
            raise Killed
        return more

    method.next_round = next_round  # type: ignore[method-assign]
    at = 7 if moment == "first step" else 0
    with stopping_after(method, at, Killed.now), pytest.raises(Killed):
        Trainer(options(**config), tmp_path / "killed").fit(method, Numbers(), on_round=on_round)
    resumed, again = Ladder(dropout=0.3), []
    trainer = Trainer(options(resume_from_checkpoint="latest", **config), tmp_path / "killed")
    trainer.fit(resumed, Numbers(), on_round=again.append)
    # the round it was killed at the end of ends once more; one that the next has followed does not
    assert (ends, again) == ([0, 1, 2], [2] if moment == "first step" else [1, 2])
    same(tmp_path / "killed", tmp_path / "whole")
    assert_close(weights(resumed), weights(whole), **EXACT)


def test_a_finished_run_continued_is_the_longer_run(tmp_path: Path) -> None:
    changes = {"ema_decay": 0.5, "checkpointing_steps": 4}
    train(tmp_path / "short", max_train_steps=6, **changes)
    resumed = train(tmp_path / "short", max_train_steps=11, resume_from_checkpoint="latest", **changes)
    whole = train(tmp_path / "whole", max_train_steps=11, **changes)
    same(tmp_path / "short", tmp_path / "whole")
    assert_close(weights(resumed), weights(whole), **EXACT)


def test_a_finished_run_resumed_is_loaded_and_left_as_it_is(tmp_path: Path) -> None:
    whole = train(tmp_path, ema_decay=0.5)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    resumed = train(tmp_path, Regression(seed=9), ema_decay=0.5, resume_from_checkpoint="latest")
    assert_close(weights(resumed), weights(whole), **EXACT)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resuming_from_a_step_or_a_folder(tmp_path: Path) -> None:
    train(tmp_path / "whole", checkpointing_steps=2)
    for name, which in (("step", "4"), ("folder", str(tmp_path / "whole" / "checkpoints" / "4"))):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        train(tmp_path / name, checkpointing_steps=2, resume_from_checkpoint=which)
        same(tmp_path / name, tmp_path / "whole")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "flipped": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "begun": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["student.safetensors", "student.optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_costs_steps_but_no_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    changes = {"checkpointing_steps": 2, "max_train_steps": 5}
    train(tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    DAMAGES[damage](tmp_path / "hurt" / "checkpoints" / "5" / name)
    with pytest.raises(InputError, match=f"checkpoints/5/{name} .*another one"):
        train(tmp_path / "hurt", resume_from_checkpoint="latest", resume_strict=True, **changes)
    train(tmp_path / "hurt", resume_from_checkpoint="latest", **changes)
    assert f"checkpoints/5/{name} (" in caplog.text and "going back to step 4" in caplog.text
    same(tmp_path / "hurt", tmp_path / "whole")


class Trap:
    """A pickle that touches a file where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    sprung, checkpoint = tmp_path / "sprung", tmp_path / "run" / "checkpoints" / "5"
    train(tmp_path / "run", max_train_steps=5, checkpointing_steps=2)
    for name in ("optimizer.pt", "pytorch_model.bin", "scheduler.pkl", "random_states_0.pkl", "student.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap(sprung)))
    train(tmp_path / "run", max_train_steps=8, checkpointing_steps=2, resume_from_checkpoint="5")
    train(tmp_path / "whole", max_train_steps=8, checkpointing_steps=2)
    same(tmp_path / "run", tmp_path / "whole")
    # in the place of a listed file, and listed with its own hash
    newest = tmp_path / "run" / "checkpoints" / "8"
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("student.safetensors", "student.optimizer.safetensors"):
        kept, data = (newest / name).read_bytes(), pickle.dumps(Trap(sprung))
        (newest / name).write_bytes(data)
        forged = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        (newest / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | forged}))
        with pytest.raises(InputError, match=name):
            train(tmp_path / "run", max_train_steps=9, resume_from_checkpoint="latest")
        (newest / name).write_bytes(kept)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"


def test_without_a_checkpoint_it_says_that_it_starts_at_step_0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    method = Regression()
    with stopping_after(method, 3, Killed.now), pytest.raises(Killed):
        train(tmp_path / "killed", method)
    capsys.readouterr()
    train(tmp_path / "killed", resume_from_checkpoint="latest")
    assert "starting from step 0" in capsys.readouterr().out
    train(tmp_path / "whole")
    same(tmp_path / "killed", tmp_path / "whole")
    train(tmp_path / "whole", resume_from_checkpoint="latest")
    assert f"resuming from {tmp_path / 'whole' / 'checkpoints' / '6'} (step 6)" in capsys.readouterr().out


class Wide(Regression):
    """Another size of the same layers, as another LoRA rank would be."""

    def __init__(self) -> None:
        super().__init__()
        self.student = network(0, width=4)


class Renamed(Regression):
    pass


@pytest.mark.parametrize(
    ("make", "data", "changes", "named"),
    [
        (Regression, Numbers, {"seed": 1}, "train.seed: 0 -> 1"),
        (Regression, Numbers, {"train_batch_size": 4}, "global batch size 8"),
        (Regression, Numbers, {"gradient_accumulation_steps": 2}, "global batch size 8"),
        (Regression, lambda: Numbers(count=63), {}, "number of samples 64"),
        (Regression, Numbers, {"ema_decay": 0.9}, "train.ema_decay: None -> 0.9"),
        (Renamed, Numbers, {}, "method Regression"),
        (Duel, Numbers, {}, "method Regression"),
        (Wide, Numbers, {}, "method Regression"),
    ],
)
def test_resuming_as_another_run_is_refused(
    tmp_path: Path, make: Callable[[], Method], data: Callable[[], Numbers], changes: dict[str, Any], named: str
) -> None:
    train(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=f"expected .*{named}.*(start anew)"):
        train(tmp_path, make(), data(), resume_from_checkpoint="latest", **changes)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_teacher_may_lie_elsewhere_but_must_be_the_same(tmp_path: Path) -> None:
    """It is told by a hash; in another precision, and for a run that has none, nobody can tell."""

    def run(steps: int, teacher: dict[str, str], **more: Any) -> None:
        trainer = Trainer(options(max_train_steps=steps, **more), tmp_path)
        trainer.teacher = teacher
        trainer.fit(Regression(), Numbers())

    run(2, {"float32": "abc"})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"expected the teacher of checkpoint .*other weights.*--teacher\.path .*anew"):
        run(3, {"float32": "def"}, resume_from_checkpoint="latest")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for steps, teacher in ((3, {"float32": "abc"}), (4, {"bfloat16": "def"}), (5, {}), (6, {"float32": "def"})):
        run(steps, teacher, resume_from_checkpoint="latest")
        assert saved(tmp_path)[1]["teacher"] == teacher


def test_networks_of_other_shapes_are_refused(tmp_path: Path) -> None:
    train(tmp_path)
    method = Regression()
    method.student = network(0, width=4)
    with pytest.raises(InputError, match=r"names or shapes \(0.weight, 2.bias, 2.weight\).*rank.*start anew"):
        train(tmp_path, method, Numbers(width=4), resume_from_checkpoint="latest")


def test_the_same_global_batch_in_other_parts_may_go_on(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=3)
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 4, "resume_from_checkpoint": "latest"}
    method, whole = train(tmp_path, max_train_steps=6, **changes), train(tmp_path / "whole", max_train_steps=6)
    assert_close(weights(method), weights(whole), rtol=1e-4, atol=1e-6)


def test_new_options_of_the_optimizer_hold_from_the_next_step_on(tmp_path: Path) -> None:
    train(tmp_path / "plain", max_train_steps=3)
    shutil.copytree(tmp_path / "plain", tmp_path / "decayed")
    before, again = saved(tmp_path / "plain")[0], {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    plain = train(tmp_path / "plain", **again)
    decayed = train(tmp_path / "decayed", adam_weight_decay=1.0, **again)
    # AdamW first shrinks by lr * decay (.01 is the default): the two differ by that, and in nothing else
    for name, value in weights(decayed).items():
        assert_close(weights(plain)[name] - value, 1e-2 * (1.0 - 0.01) * before[name], rtol=1e-3, atol=1e-6)


def test_an_earlier_fit_made_longer_is_refused_by_the_later(tmp_path: Path) -> None:
    def run(steps: int, resume: str | None) -> None:
        trainer = Trainer(options(resume_from_checkpoint=resume), tmp_path)
        trainer.fit(Regression(), Numbers(), "first", steps=steps)
        trainer.fit(Duel(), Numbers(), "second", steps=2)

    run(3, None)
    with pytest.raises(InputError, match="first step 3.*got 4"):
        run(4, "latest")


def test_a_run_of_named_fits_goes_on_from_its_latest_only(tmp_path: Path) -> None:
    Trainer(options(max_train_steps=2), tmp_path).fit(Regression(), Numbers(), "first")
    with pytest.raises(InputError, match="latest in a run of named fits, got '2'"):
        Trainer(options(max_train_steps=2, resume_from_checkpoint="2"), tmp_path).fit(Regression(), Numbers(), "first")


def test_trackers_are_told_nothing_of_a_finished_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard hides all that comes after the step a tracker is opened at: a finished fit must not open one."""
    starts: list[int] = []

    class Told:
        def __init__(self, _report_to: Any, _folder: Any, _config: Any, start: int, _enabled: bool) -> None:
            starts.append(start)

        def log(self, row: dict[str, Any], step: int) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr("stepdistill.training.loop.Trackers", Told)
    for resume, steps in ((None, 2), ("latest", 4)):
        trainer = Trainer(options(max_train_steps=2, resume_from_checkpoint=resume), tmp_path)
        trainer.fit(Regression(), Numbers(), "first")
        trainer.fit(Duel(), Numbers(), "second", steps=steps)
    assert starts == [0, 2, 4]
