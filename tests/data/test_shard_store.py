import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.data import cache
from stepdistill.data.cache import Entry, ShardStore
from stepdistill.errors import InputError

ROWS = {"x": torch.arange(3)}


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    store = ShardStore(tmp_path / "a" / "b", {"format": 1})
    store.begin()
    return store


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []
    original = cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: hashed.append(path) or original(path))
    return hashed


def test_what_is_written_is_found_by_another_process(store: ShardStore):
    entry = store.write("a", ROWS, 3, ["x.png (broken)"])
    assert (entry.rows, entry.bad) == (3, ("x.png (broken)",))
    other = ShardStore(store.folder, {})
    assert other.find("a") == entry and other.has("a")
    assert other.find("b") is None and not other.has("b")
    assert json.loads((store.folder / "about.json").read_text()) == {"format": 1}


def test_files_are_as_readable_as_others(store: ShardStore):
    store.write("a", ROWS, 3)
    modes = {oct(file.stat().st_mode) for file in store.folder.iterdir()}
    assert len(modes) == 1


def test_a_finished_cache_is_not_hashed_and_a_copy_is_once(
    store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    entry = store.write("a", ROWS, 3)
    hashed = count_hashes(monkeypatch)
    assert store.find("a") == entry
    assert hashed == []
    copy = ShardStore(Path(shutil.copytree(store.folder, tmp_path / "copy")), {})
    os.utime(copy.path("a"), ns=(0, 10**18))
    for _ in range(3):
        found = copy.find("a")
        assert found is not None and found.sha256 == entry.sha256
    assert hashed == [copy.path("a")]


def test_damage_is_seen_by_size_or_by_hash_and_forgotten(store: ShardStore, caplog: pytest.LogCaptureFixture):
    for damage in (b"", store_bytes(store)[:-1] + b"?", store_bytes(store)[:-1], None):
        store.write("a", ROWS, 3)
        if damage is None:
            store.path("a").unlink()
        else:
            store.path("a").write_bytes(damage)
        assert store.find("a") is None and not store.has("a")
        assert "a.safetensors is damaged or missing" in caplog.text
        caplog.clear()
        assert store.find("a") is None and caplog.text == ""  # said once


def store_bytes(store: ShardStore) -> bytes:
    store.write("whole", ROWS, 3)
    return store.path("whole").read_bytes()


@pytest.mark.parametrize("dies_at", range(6))
@pytest.mark.parametrize("before", [True, False])
def test_a_process_killed_at_any_write_leaves_what_the_next_completes(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch, dies_at: int, before: bool
):
    """A kill is an exception after which nothing runs: cleaning up is taken away, too."""
    calls = 0

    class Killed(BaseException):
        pass

    def dying(function: Any) -> Any:
        def call(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == dies_at and before:
                raise Killed
            result = function(*given)
            if calls - 1 == dies_at:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(cache, "_flush", dying(cache._flush))
        patch.setattr(Path, "unlink", lambda *_given, **_options: None)
        with pytest.raises(Killed):
            store.write("a", ROWS, 3)
    entry = store.find("a")
    if entry is not None:  # only the last fsync was missing
        assert calls == 6 or (calls, before) == (5, False)
    else:
        assert not store.has("a")
        entry = store.write("a", ROWS, 3)
    assert store.find("a") == entry
    assert Entry.read((store.folder / "a.json").read_text()) == entry


def test_an_exit_in_the_middle_leaves_no_half_files(store: ShardStore, monkeypatch: pytest.MonkeyPatch):
    def stopped(_path: Path) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(cache, "_sha256", stopped)
    with pytest.raises(SystemExit):
        store.write("a", ROWS, 3)
    assert [file.name for file in store.folder.iterdir()] == ["about.json"]


def test_leftovers_of_killed_runs_go_after_a_day(store: ShardStore):
    old, new = store.folder / ".b.1.tmp", store.folder / ".c.2.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.begin()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_cache_that_may_only_be_read_is_used(store: ShardStore, monkeypatch: pytest.MonkeyPatch):
    entry = store.write("a", ROWS, 3)
    os.utime(store.path("a"), ns=(0, 10**18))

    def refused(*_given: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(os, "replace", refused)
    store.begin()
    found = store.find("a")
    assert found is not None and found.sha256 == entry.sha256
    with pytest.raises(InputError, match=r"write the latent cache.*Permission denied.*--data\.cache_dir"):
        store.write("b", ROWS, 3)
