"""The bar of a sweep: cells by their steps, what was there before, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeping import sweep_in, swept

from stepdistill.bench import sweep as module
from stepdistill.bench.contenders import Contender
from stepdistill.bench.rows import Cell
from stepdistill.bench.sweep import Job
from stepdistill.errors import InputError


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Where the bar stands after each batch."""
    seen: list[float] = []
    original = module._Bar.advance

    def advance(self: Any, cell: Cell) -> None:
        original(self, cell)
        seen.append(self.bar.n)

    monkeypatch.setattr(module._Bar, "advance", advance)
    return seen  # type: ignore[return-value]


def test_the_bar_counts_cells_by_their_steps(
    jobs: list[Job], tmp_path: Path, bar: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_in(tmp_path).run(jobs)
    # five batches of 2 steps, then five of 1: of two cells the first takes two thirds of the time
    assert bar == pytest.approx([4 / 15 * i for i in range(1, 6)] + [4 / 3 + 2 / 15 * i for i in range(1, 6)])
    assert "2.00/2" in capsys.readouterr().err


def test_the_bar_knows_what_was_finished_before(jobs: list[Job], tmp_path: Path, bar: list[float]) -> None:
    swept(tmp_path, jobs[:1])
    bar.clear()
    sweep_in(tmp_path).run(jobs)
    assert bar == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0])


def test_what_was_there_before_tells_nothing_of_the_time_that_is_left(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(tmp_path, jobs[:1])
    bars: list[Any] = []
    original = module._Bar.advance
    monkeypatch.setattr(module._Bar, "advance", lambda self, cell: (bars.append(self.bar), original(self, cell)))
    sweep_in(tmp_path).run(jobs)
    assert {bar.initial for bar in bars} == {1} and bars[0].n == pytest.approx(2)


def test_an_error_leaves_no_half_line(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The bar is ended, so that what is said next has a line of its own; and the cell is named."""

    def images(*_: Any) -> Any:
        raise InputError("expected finite pixels, got nan")

    monkeypatch.setattr(Contender, "images", images)
    with pytest.raises(InputError, match="^teacher, 2 steps, guidance 3: expected finite pixels, got nan$") as caught:
        sweep_in(tmp_path).run(jobs)
    assert caught.traceback and capsys.readouterr().err.endswith("\n")  # while the error still holds the bar
