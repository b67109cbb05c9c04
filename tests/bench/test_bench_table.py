"""The table lines up, says everything that is needed to read it, and states no ratio that the floor doesn't allow."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from invented import invented

from stepdistill.bench.rows import Cell, Quality, Results, Speed, Value
from stepdistill.bench.table import UNCLEAR, columns, markdown, single, to_csv

VALUES = {
    "fd": Value(20.0, (18.5, 21.25)),
    "kid": Value(0.02),
    "recall": Value(0.875),
    "diversity": Value(3.14159),
    "accuracy": Value(0.375, (0.3, 0.45)),
    "accuracy/shape": Value(0.5),
    "accuracy/colour": Value(0.75),
}
REAL = {
    "fd": {"value": 1.0, "interval": [1 - 0.392, 1 + 0.392]},
    **{
        key: {"value": value, "interval": None}
        for key, value in {"recall": 0.95, "diversity": 4.0, "accuracy": 1.0}.items()
    },
}


def row(model: str = "teacher", steps: int = 4, fd: float = 20.0, **changes: Any) -> Quality:
    values = {**VALUES, "fd": Value(fd, (fd - 1.5, fd + 1.25))}
    return replace(Quality(Cell(model, steps, 3.0), 100, 8.0, values), **changes)


def speed(cell: Cell, *seconds: float, batch_size: int = 1) -> Speed:
    return Speed(cell, batch_size, seconds, {}, 8.0)


def results(*rows: Quality, **changes: Any) -> Results:
    protocol = {"features": {"name": "demo judge", "hash": "abc123"}, "real": {"100": REAL}, "seeds": {"noise": 0}}
    return Results(list(rows), **{"protocol": protocol, **changes})


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_markdown_lines_up_and_says_everything() -> None:
    main = row()
    text = markdown(
        results(
            main,
            row(steps=1, fd=101.0, against=Value(81.0, (70.0, 90.0))),
            row("student", 1, 21.0, against=Value(1.0, (-1.0, 3.0))),
            row("student", 16),
            notes=["Late."],
            speed=[speed(main.cell, 0.3, 0.1, 0.2), speed(main.cell, 1.2, batch_size=4)],
            teacher=main.cell,
            environment={"torch": "9.9", "threads": 3, "accelerator": "none"},
        )
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1  # every bar in one column
    found = cells(text)
    assert found[0][:4] == ["model", "steps", "guidance", "evaluations"]
    first = [
        "teacher",
        "4",
        "3",
        "8",
        "20 [18.5, 21.2]",
        "",
        "1.00",
        "",
        "0.02",
        "0.88",
        "3.14",
        "37.5% [30.0%, 45.0%]",
    ]
    assert found[2] == [*first, "shape 50.0%", "0.2", "100"]
    assert found[3][5] == "+81 [+70, +90]"
    assert found[4][5:8] == ["indistinguishable", "1.05", "99%"]
    assert found[5][-2] == ""  # not timed
    for words in (
        "demo judge (abc123)", "100 real images", "distance 1 (the floor)", "95 % bootstrap", "Late.", "batch of 1 (",
        "less that of teacher, 4 steps, guidance 3", "student: 1 step at guidance 3: indistinguishable",
        "CPU threads 3, torch 9.9",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(("ours", "clear"), [(2.01, True), (1.99, False)])
def test_no_ratio_within_five_deviations_of_the_floor(ours: float, clear: bool) -> None:
    text = markdown(results(row(fd=20.0), row("student", fd=ours)))
    assert any(UNCLEAR in cell for line in cells(text) for cell in line) == (not clear)


@pytest.mark.parametrize(("best", "clear"), [(2.01, True), (1.99, False)])
def test_without_any_ratio_there_is_no_column_for_them(best: float, clear: bool) -> None:
    text = markdown(results(row(fd=best), row("student", fd=20.0)))
    assert ("x teacher's best" in cells(text)[0]) == clear
    assert ("- No ratios of distances: the teacher's lowest is less than 5 standard" in text) == (not clear)


def test_a_column_is_there_if_something_was_measured_for_it() -> None:
    bare = row("student", values={"recall": Value(0.5)})
    assert [head for head, _ in columns(results(bare))] == [
        "model", "steps", "guidance", "evaluations", "Frechet distance", "recall", "N",
    ]  # fmt: skip
    text = markdown(results(bare, row("other")))
    assert cells(text)[2][4:6] == ["", ""]  # no distance, no KID
    assert "x teacher's best" not in text and "against the teacher" not in text
    nothing = markdown(results(bare, protocol={"features": {"name": "f", "hash": "h"}}))
    assert "real images score" not in nothing


@pytest.mark.parametrize(("dim", "said"), [(10, False), (11, True)])
def test_too_few_images_for_the_features_are_said(dim: int, said: bool) -> None:
    text = markdown(results(row("teacher", 50, 20.0), protocol={"features": {"name": "f", "hash": "h", "dim": dim}}))
    assert (f"N = 100 is fewer than 10 images for each of the {dim} dimensions" in text) == said


def test_a_model_called_like_a_table_breaks_none() -> None:
    text = markdown(results(row("a|b\nc"), notes=["one\n\n# two"]))
    assert cells(text.replace("\\|", "/"))[2][0] == "a/b c"
    assert "\n#" not in text


def test_csv_has_every_value_with_its_interval() -> None:
    table = results(
        row(), row("s, t", against=Value(1.5, (0.5, 2.5)), values={"fd": Value(0.1 + 0.2), "cmmd": Value(7.0)}),
        speed=[speed(row().cell, 8.0, batch_size=4), speed(row().cell, 4.0, batch_size=2)],
    )  # fmt: skip
    first, second = csv.DictReader(io.StringIO(to_csv(table)))
    assert (first["fd"], first["fd_low"], first["fd_high"]) == ("20.0", "18.5", "21.25")
    assert (first["accuracy/shape"], first["cmmd"], first["against"]) == ("0.5", "", "")
    assert (first["seconds_p50"], first["batch_size"]) == ("2.0", "2")  # seconds an image at the smallest batch
    assert "kid_low" not in first  # nobody has its interval
    assert (second["model"], second["fd"], second["fd_low"], second["cmmd"]) == ("s, t", repr(0.1 + 0.2), "", "7.0")
    assert (second["against"], second["against_low"], second["against_high"]) == ("1.5", "0.5", "2.5")
    assert (second["seconds_p50"], second["kid"]) == ("", "")
    assert len(to_csv(invented()).splitlines()) == 1 + len(invented().quality)


def test_the_smallest_batch_is_timed_for_the_table() -> None:
    main = row()
    both = [speed(main.cell, 4.0, batch_size=4), speed(main.cell, 1.0, batch_size=2), speed(Cell("x", 1, 1.0), 9.0)]
    found = single(results(main, speed=both), main)
    assert found is not None and found.batch_size == 2
    assert "batch of 2" in markdown(results(main, speed=both))
