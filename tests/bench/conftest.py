"""What several files here begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweeping import Corners, bench_place, bench_words, files_of, jobs_of, swept, teacher_of
from tiny import tiny_pipeline

from stepdistill.bench import command
from stepdistill.bench.contenders import Contender, open_contenders
from stepdistill.bench.sweep import Job


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Contender:
    return teacher_of(tiny_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def jobs(teacher: Contender) -> list[Job]:
    return jobs_of([teacher])


@pytest.fixture(scope="module")
def whole(teacher: Contender, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    swept(folder, jobs_of([teacher]))
    return files_of(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def opened_once(place: Path) -> Callable[..., list[Contender]]:
    """`open_contenders`, which remembers who is in `place`: opening a student takes longer than a small sweep of it."""
    known: dict[str, list[Contender]] = {}

    def opened(teacher: str, students: Sequence[str], *more: Any) -> list[Contender]:
        words = repr((teacher, *students, *more))
        if [teacher, *students] != [str(place / "sd"), str(place / "lcm")]:
            return open_contenders(teacher, students, *more)
        if words not in known:
            known[words] = open_contenders(teacher, students, *more)
        return list(known[words])

    return opened


@pytest.fixture
def flags(place: Path, opened_once: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command's words, for a command whose slow parts are replaced."""
    monkeypatch.setattr(command, "open_contenders", opened_once)
    monkeypatch.setattr(command, "open_features", lambda spec, device: Corners())
    monkeypatch.setattr(command, "RESAMPLES", 20)
    monkeypatch.setattr(command, "write_report", lambda *_: None)  # seconds each
    return partial(bench_words, place)
