import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.training import checkpoint
from stepdistill.training.checkpoint import CheckpointStore

EXACT = {"rtol": 0, "atol": 0}


def payload(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "student": {"w": torch.full((7, 3), float(step)), "half": torch.full((5,), step / 3, dtype=torch.bfloat16)},
        "optimizer": {"0.step": torch.tensor(float(step))},
    }


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, payload(step), {"step": step, "round": None})


def assert_whole(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step
    assert found.state == {"step": step, "round": None}
    for name, tensors in payload(step).items():
        assert_close(found.tensors(name), tensors, **EXACT)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


# What is saved comes back


def test_round_trip(store):
    save(store, 3)
    assert_whole(store.find(), 3)
    assert_whole(store.find("3"), 3)
    assert_whole(store.find(str(store.folder / "3")), 3)
    assert store.find().tensors("critic") == {}
    assert sorted(os.listdir(store.folder)) == ["3"]
    names = ["manifest.json", "optimizer.safetensors", "state.json", "student.safetensors"]
    assert sorted(os.listdir(store.folder / "3")) == names


def test_manifest_lists_sizes_and_hashes(store):
    save(store, 3)
    manifest = json.loads((store.folder / "3/manifest.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == set(os.listdir(store.folder / "3")) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (store.folder / "3" / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_none_only_without_any_checkpoint(store):
    assert store.find() is None and store.find(strict=True) is None
    store.folder.mkdir(parents=True)
    (store.folder / ".saving-5").mkdir()  # a first save that was killed
    assert store.find() is None


def test_tied_and_strided_tensors(store):
    w = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {
        "a": w,
        "tied": w,
        "t": w.t(),
        "row": w[1],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }
    store.save(1, {"student": tensors, "nothing": {}}, {})
    assert_close(store.find().tensors("student"), {k: v.detach() for k, v in tensors.items()}, **EXACT)
    assert store.find().tensors("nothing") == {}


def test_files_have_the_usual_permissions(store):
    save(store, 1)
    modes = {path.stat().st_mode for path in (store.folder / "1").iterdir()}
    assert len(modes) == 1  # safetensors alone writes 0600


@pytest.mark.parametrize("state", [{1: "int key"}, {"a": {2: 3}}, {"a": (1, 2)}, {"a": float("nan")}])
def test_state_that_json_would_change_is_refused(store, state):
    with pytest.raises(ValueError):
        store.save(1, {}, state)
    assert not store.folder.exists()


@pytest.mark.parametrize("name", ["../out", ".hidden", "a/b", ""])
def test_names_stay_inside_the_folder(store, name):
    with pytest.raises(ValueError, match="plain file name"):
        store.save(1, {name: {}}, {})


# Rotation


def test_steps_are_ordered_as_numbers(store):
    store.limit = None
    save(store, 9, 10, 100)
    assert store.steps() == [9, 10, 100]
    assert store.find().step == 100
    shutil.rmtree(store.folder / "100")
    assert store.find().step == 10


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [8, 9, 10, 11]), (3, [9, 10, 11]), (2, [10, 11]), (1, [10, 11]), (0, [10, 11])]
)
def test_rotation_keeps_at_least_two(tmp_path, limit, kept):
    store = CheckpointStore(tmp_path, limit)
    save(store, 8, 9, 10, 11)
    assert store.steps() == kept
    assert sorted(os.listdir(tmp_path), key=int) == [str(s) for s in kept]


def test_going_back_sets_later_steps_aside(store, caplog):
    save(store, 50, 100)
    save(store, 60)  # resumed from 50
    assert "set aside" in caplog.text
    assert_whole(store.find(), 60)
    assert store.steps() == [50, 60] and "abandoned-100" not in os.listdir(store.folder)
    save(store, 70)
    assert store.steps() == [60, 70]


def test_what_is_set_aside_stays_until_two_others_are_there(store):
    save(store, 100, 200)
    save(store, 10)
    assert store.steps() == [10]
    assert_whole(store.find(str(store.folder / "abandoned-200")), 200)
    save(store, 20)
    assert sorted(os.listdir(store.folder)) == ["10", "20"]


def test_same_step_is_replaced(store):
    save(store, 4, 5)
    store.save(5, {"student": {"w": torch.ones(2)}}, {"again": True})
    found = store.find()
    assert found.state == {"again": True} and found.tensors("optimizer") == {}
    assert sorted(os.listdir(store.folder)) == ["4", "5"]


def test_leftovers_of_killed_saves_are_removed_and_others_left(store):
    save(store, 1)
    (store.folder / ".saving-2").mkdir()
    (store.folder / ".saving-2/student.safetensors").write_bytes(b"half")
    (store.folder / "notes").mkdir()
    assert_whole(store.find(), 1)
    save(store, 3)
    assert sorted(os.listdir(store.folder)) == ["1", "3", "notes"]


def test_everything_is_flushed_before_it_is_relied_on(store, monkeypatch):
    store.folder.mkdir(parents=True)
    save(store, 1, 2)
    events: list[str] = []
    sync, rename = checkpoint._sync, Path.rename

    def record_sync(path):
        events.append(f"sync {path.name}")
        sync(path)

    def record_rename(self, target):
        events.append(f"rename {self.name} {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(checkpoint, "_sync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(store, 3)
    files = {f"sync {name}" for name in ("optimizer.safetensors", "state.json", "student.safetensors")}
    assert set(events[:3]) == files
    tail = ["sync manifest.json", "sync .saving-3", "rename .saving-3 3", "sync checkpoints", "sync run"]
    assert events[3:] == [*tail, "rename 1 .saving-removed-1"]


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(**changes):
    def apply(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


DAMAGE = {
    "truncated": ("student.safetensors", truncate, "size"),
    "flipped bit": ("student.safetensors", flip, "hash"),
    "flipped state": ("state.json", flip, "hash"),
    "missing": ("optimizer.safetensors", Path.unlink, "missing"),
    "no manifest": ("manifest.json", Path.unlink, "missing"),
    "torn manifest": ("manifest.json", truncate, "unreadable manifest"),
    "binary manifest": ("manifest.json", lambda p: p.write_bytes(b"\xff\x00\x80"), "unreadable manifest"),
    "manifest is a list": ("manifest.json", lambda p: p.write_text("[1]"), "unreadable manifest"),
    "empty manifest": ("manifest.json", lambda p: p.write_text("{}"), "unreadable manifest"),
    "other step": ("manifest.json", edit(step=7), "its step is 7"),
    "future format": ("manifest.json", edit(format=99), "format 99"),
    "nothing listed": ("manifest.json", edit(files={}), "unreadable manifest"),
    "files is a list": ("manifest.json", edit(files=["state.json"]), "unreadable manifest"),
    "outside": (
        "manifest.json",
        edit(files={"state.json": {"size": 1, "sha256": ""}, "../x": {}}),
        "unreadable manifest",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(store, caplog, kind):
    file, damage, what = DAMAGE[kind]
    save(store, 10, 20)
    damage(store.folder / "20" / file)
    with caplog.at_level(logging.WARNING):
        assert_whole(store.find(), 10)
    (record,) = caplog.records
    assert str(store.folder / "20" / file) in record.getMessage() and what in record.getMessage()
    for call in (lambda: store.find(strict=True), lambda: store.find("20")):
        with pytest.raises(InputError, match=what) as error:
            call()
        assert str(store.folder / "20" / file) in str(error.value)


def test_all_damaged_is_an_error_and_never_a_fresh_start(store):
    save(store, 10, 20)
    truncate(store.folder / "10/student.safetensors")
    flip(store.folder / "20/state.json")
    with pytest.raises(InputError) as error:
        store.find()
    assert str(store.folder / "10/student.safetensors") in str(error.value)
    assert str(store.folder / "20/state.json") in str(error.value)


def test_any_bit_of_the_tensors_counts(store):
    store.save(1, {"student": {"w": torch.tensor([1.0])}}, {})
    path = store.folder / "1/student.safetensors"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 5):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(InputError, match="hash"):
            store.find()


@pytest.mark.parametrize("which", ["30", "nowhere", "", "checkpoints/5"])
def test_an_unknown_choice_lists_what_there_is(store, which):
    save(store, 10, 20)
    with pytest.raises(InputError, match="10, 20"):
        store.find(which)


def test_a_folder_that_is_no_checkpoint(store, tmp_path):
    with pytest.raises(InputError, match=r"manifest.json .missing"):
        store.find(str(tmp_path))


class Bomb:
    def __reduce__(self):
        return (os._exit, (3,))


OPENED: list[str] = []
WATCHING: list[bool] = []


def _watch(event: str, args: tuple) -> None:
    if WATCHING and event == "open":
        OPENED.append(str(args[0]))


def test_a_pickle_in_the_folder_is_never_opened(store):
    save(store, 1, 2)
    for folder in (store.folder, store.folder / "2"):
        for name in ("optimizer.pt", "random_states_0.pkl", "critic.safetensors", "pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Bomb()))
    OPENED.clear()
    sys.addaudithook(_watch)
    WATCHING.append(True)
    try:
        found = store.find()
        assert_whole(found, 2)
        assert found.tensors("critic") == {}  # a file that the manifest doesn't list
    finally:
        WATCHING.clear()
    ours = {Path(p).name for p in OPENED if str(store.folder) in p}
    assert {"manifest.json", "state.json"} <= ours
    assert ours <= {"manifest.json", "state.json", "student.safetensors", "optimizer.safetensors"}
