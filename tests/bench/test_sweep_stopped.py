"""A sweep that is stopped, at any batch and between any two changes to the disk, ends like one that nothing disturbed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sweeping import PROMPTS, Killed, drawn, dying, files_of, small_plan, sweep_in, swept

from stepdistill.bench import sweep as module
from stepdistill.bench.contenders import Contender
from stepdistill.bench.plan import APART
from stepdistill.bench.sweep import Job
from stepdistill.errors import InputError


class Disk:
    """Counts what is done to files and folders while it is watched, and does no more than so much of it.

    By an audit hook, which sees the steps inside of rmtree too. It can't be taken off, so it sleeps.
    """

    def __init__(self) -> None:
        self.left: int | None = None
        self.error: BaseException = Killed()
        sys.addaudithook(self._seen)

    def _seen(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is None:
            return
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if changes or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.left -= 1
            if self.left < 0:
                raise self.error

    @contextlib.contextmanager
    def stopping(self, after: int, error: BaseException | None = None) -> Iterator[None]:
        self.error, self.left = error or Killed(), after
        try:
            yield
        finally:
            self.left = None


DISK = Disk()
FEW = {"prompts": PROMPTS[:3], "batch_size": 2, "diversity": (1, 2)}


def stopped_everywhere(folder: Path, again: Any, before: Any, error: BaseException | None = None) -> Iterator[Path]:
    """Folders in which `again(folder)` was stopped before its first change to the disk, its second, and so on, until none."""
    for after in itertools.count():
        place = folder / str(after)
        before(place)
        try:
            with DISK.stopping(after, error):
                again(place)
        except (Killed, InputError):
            yield place
        else:
            assert after > 20  # it was stopped at all
            return


@pytest.mark.parametrize("after", range(10))
def test_a_sweep_killed_after_any_batch_goes_on(
    after: int, jobs: list[Job], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Ten batches in all. What is resumed makes each batch that is missing once, and ends with the same bytes."""
    with pytest.MonkeyPatch.context() as patch:
        made = dying(patch, after)
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    finished = {name: data for name, data in files_of(tmp_path).items() if name.endswith("samples.safetensors")}
    assert len(finished) == after // 5
    with pytest.MonkeyPatch.context() as patch:
        rest = dying(patch, 10)
        swept(tmp_path, jobs)
    assert made[:-1] + rest == [(cell, start) for cell, _ in jobs for start in (0, 4, 8, APART, APART + 4)]
    assert files_of(tmp_path) == whole
    assert all(whole[name] == data for name, data in finished.items())


def test_killed_while_parts_are_joined(
    jobs: list[Job], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "merged", die)
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", die)  # joined, but the parts still lie there
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    assert any("parts" in name for name in files_of(tmp_path))
    swept(tmp_path, jobs)
    assert files_of(tmp_path) == whole


def test_killed_between_any_two_writes(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contender, "images", drawn)
    plan, options = small_plan(**FEW), {"kept": 1}
    swept(tmp_path / "whole", jobs, plan, **options)
    expected = files_of(tmp_path / "whole")
    for place in stopped_everywhere(tmp_path, lambda p: swept(p, jobs, plan, **options), lambda p: None):
        swept(place, jobs, plan, **options)
        assert files_of(place) == expected, place.name


def test_killed_between_any_two_writes_while_cells_are_made_again(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --overwrite what is left is refused, or of one sweep, the new or the old; never a mixture."""
    monkeypatch.setattr(Contender, "images", drawn)
    old, new, options = small_plan(**FEW, seed=8), small_plan(**FEW), {"kept": 1}
    swept(tmp_path / "old", jobs, old, kept=3)
    swept(tmp_path / "whole", jobs, new, **options)
    expected, before = files_of(tmp_path / "whole"), files_of(tmp_path / "old")
    refused = 0
    for place in stopped_everywhere(
        tmp_path,
        lambda p: swept(p, jobs, new, overwrite=True, **options),
        lambda p: shutil.copytree(tmp_path / "old", p),
    ):
        back = shutil.copytree(place, tmp_path / "back")
        with contextlib.suppress(InputError):
            swept(back, jobs, old, kept=3)
            assert files_of(back) == before, place.name
        shutil.rmtree(back)
        try:
            swept(place, jobs, new, **options)
        except InputError:
            refused += 1
            swept(place, jobs, new, overwrite=True, **options)
        assert files_of(place) == expected, place.name
    assert refused > 2


def test_a_disk_that_is_full_at_any_write(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contender, "images", drawn)
    plan, options = small_plan(**FEW), {"kept": 1}
    swept(tmp_path / "whole", jobs[:1], plan, **options)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for place in stopped_everywhere(tmp_path, lambda p: swept(p, jobs[:1], plan, **options), lambda p: None, full):
        swept(place, jobs[:1], plan, **options)
        assert files_of(place) == files_of(tmp_path / "whole"), place.name


def test_a_full_disk_is_told(jobs: list[Job], tmp_path: Path) -> None:
    with (
        DISK.stopping(9, OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(
            InputError, match=r"expected to write '.*cells.*', got: No space left on device; .*--output_dir$"
        ),
    ):
        swept(tmp_path, jobs)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected to write '.*file/bench', got: Not a directory"):
        swept(tmp_path / "file" / "bench", jobs)


def test_leftover_images_of_a_stopped_sweep_are_written_over(
    jobs: list[Job], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        dying(patch, 0)
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    images = tmp_path / "cells" / "teacher-2-3" / "images"
    images.mkdir()
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(images / "0.png")
    swept(tmp_path, jobs)
    assert files_of(tmp_path) == whole


def test_files_that_are_cut_short_are_made_again(jobs: list[Job], whole: dict[str, bytes], tmp_path: Path) -> None:
    """After a power cut a file may be there and empty."""
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, 8)
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    part = tmp_path / "cells" / "teacher-1-3" / "parts" / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    done = tmp_path / "cells" / "teacher-2-3" / "samples.safetensors"
    done.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        made = dying(patch, 10)
        swept(tmp_path, jobs)
    assert made == [(jobs[0][0], start) for start in (0, 4, 8, APART, APART + 4)] + [
        (jobs[1][0], start) for start in (4, APART, APART + 4)
    ]
    assert files_of(tmp_path) == whole


def test_a_part_that_breaks_while_it_is_waited_for(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_tensors", lambda path, _: _broken(path))
    with pytest.raises(InputError, match=r"expected the part '.*00000.safetensors' of a sweep"):
        swept(tmp_path, jobs)


def _broken(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_a_part_that_was_cut_short_is_gone_before_others_look_for_it(
    jobs: list[Job], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The main process waits for parts to be there; an old one that is broken must not be taken for the new one."""
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, 5)
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    parts = tmp_path / "cells" / "teacher-1-3" / "parts"
    parts.mkdir()
    for number in (0, 1):  # 5 + 0 and 5 + 1: of the second of two processes, and of the first
        (parts / f"{number:05d}.safetensors").write_bytes(b"")
    sweep_in(tmp_path, rank=1, world=2).claim(jobs)
    assert [path.name for path in parts.iterdir()] == ["00001.safetensors"]
    swept(tmp_path, jobs)
    assert files_of(tmp_path) == whole


def test_the_facts_of_a_cell_are_written_first_and_never_again(jobs: list[Job], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, 3)
        with pytest.raises(Killed):
            swept(tmp_path, jobs)
    facts = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell.json")}
    assert len(facts) == 2
    swept(tmp_path, jobs)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell.json")} == facts
    found = json.loads((tmp_path / "cells" / "teacher-2-3" / "cell.json").read_text())
    assert (found["model"], found["steps"], found["guidance"]) == ("teacher", 2, 3.0)
    assert found["features"] == {"name": "corners", "hash": "0c", "dim": 12}


def test_a_folder_that_another_process_is_at(jobs: list[Job], whole: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('process 7', file=file, flush=True); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=r"in use by process 7; .*another --output_dir"):
            swept(tmp_path, jobs)
        assert files_of(tmp_path) == {}
        other.kill()
    swept(tmp_path, jobs)
    assert files_of(tmp_path) == whole


def test_too_little_memory(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Contender, "images", images)
    with pytest.raises(InputError, match="room for 4 images a call, got: out of memory; lower --batch_size"):
        swept(tmp_path, jobs)
