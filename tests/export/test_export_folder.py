"""The folder of an export changes as a whole: stopped at any rename, by an error or a kill, it holds the old or the new one."""

import json
from pathlib import Path

import pytest

from stepdistill.export.folder import ASIDE, FACTS, commit, put_back

OLD = {
    FACTS: json.dumps({"files": [FACTS, "README.md", "lora.safetensors", "unet/a", "unet/b"]}),
    "README.md": "old card", "lora.safetensors": "old", "unet/a": "old a", "unet/b": "old b", "metrics.jsonl": "mine",
}  # fmt: skip
NEW = {
    FACTS: json.dumps({"files": [FACTS, "README.md", "unet/a", "scheduler/c"]}),
    "README.md": "new card", "unet/a": "new a", "scheduler/c": "new c",
}  # fmt: skip
AFTER = {**NEW, "metrics.jsonl": "mine"}  # neither the adapter nor the second shard is of the new export


class Killed(BaseException):
    pass


def write(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[int]:
    """The `number`th rename from now on raises instead."""
    count, rename = [0], Path.rename

    def counted(path: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] == number:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    return count


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", NEW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "run", OLD)


def test_the_new_export_takes_the_place_of_the_old_one(source: Path, folder: Path) -> None:
    commit(source, folder)
    assert read(folder) == AFTER
    assert list(source.iterdir()) == []
    assert not (folder / ASIDE).exists()


def test_into_a_folder_without_an_export(source: Path, tmp_path: Path) -> None:
    commit(source, write(tmp_path / "run", {"metrics.jsonl": "mine"}))
    assert read(tmp_path / "run") == AFTER


RENAMES = 4 + 4  # four names set aside, four put in place


@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_an_error_at_any_rename_leaves_the_old_one(
    source: Path, folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, number, OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        commit(source, folder)
    assert read(folder) == OLD


@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_after_a_kill_at_any_rename_the_old_one_is_put_back(
    source: Path, folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, number, Killed())
    with pytest.raises(Killed):
        commit(source, folder)
    monkeypatch.undo()
    put_back(folder)
    assert {name: text for name, text in read(folder).items() if name in OLD} == OLD
    assert not (folder / ASIDE).exists()
    put_back(folder)
    commit(write(source, NEW), folder)
    assert read(folder) == AFTER


def test_after_a_kill_past_the_last_rename_the_new_one_stays(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def killed(*_: object, **__: object) -> None:
        raise Killed

    count = stop_at(monkeypatch, RENAMES + 1, Killed())
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        commit(source, folder)
    assert count == [RENAMES]
    monkeypatch.undo()
    put_back(folder)
    assert read(folder) == AFTER


@pytest.mark.parametrize("facts", ["", "[]", "not json", '{"files": ["../outside", "/etc/passwd"]}'])
def test_facts_that_name_nothing_of_the_folder_take_nothing_away(source: Path, tmp_path: Path, facts: str) -> None:
    write(tmp_path, {"outside": "mine"})
    commit(source, write(tmp_path / "run", {FACTS: facts, "metrics.jsonl": "mine"}))
    assert read(tmp_path / "run") == AFTER
    assert (tmp_path / "outside").read_text() == "mine"
