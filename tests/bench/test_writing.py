"""Files that are whole or not there, and messages where they can't be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench.writing import write_whole, writing
from stepdistill.errors import InputError


def test_what_is_there_is_replaced_once_the_new_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "a" / "b" / "file", list[tuple[str, bytes]]()
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        order.append(("fsync", (path.parent / ".file.tmp").read_bytes()))
        fsync(handle)

    def replaced(self: Path, target: Any) -> Any:
        order.append(("replace", self.read_bytes()))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    for data in (b"old", b"new one"):
        write_whole(path, data)
        assert path.read_bytes() == data and [p.name for p in path.parent.iterdir()] == ["file"]
    assert order == [(what, data) for data in (b"old", b"new one") for what in ("fsync", "replace")]


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"half of a long one")
    write_whole(tmp_path / "file", b"short")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"short"}


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"old")
    owner, name = {"write": (Path, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(
            InputError, match=r"to write '.*file', got: No space left on device; .* or give another --there$"
        ):
            write_whole(path, b"new", "--there")
    assert path.read_bytes() == b"old"


def test_errors_without_a_number_and_others(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got: broken; .*--output_dir"), writing(tmp_path):
        raise OSError("broken")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("not ours")
