"""The table reads back as it was written, lines up, and states no ratio that the floor doesn't allow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench.table import AT_THE_FLOOR, Results, Row, environment
from stepdistill.errors import InputError

ROW = Row(
    model="teacher",
    steps=4,
    guidance=3.0,
    frechet=20.0,
    interval=(18.5, 21.25),
    accuracy={"shape": 0.5, "colour": 0.75, "all": 0.375},
    accuracy_interval=(0.3, 0.45),
    seconds=(0.3, 0.1, 0.2),
    evaluations=8.0,
    n=100,
)


def results(*rows: Row, **changes: Any) -> Results:
    protocol = {"features": {"name": "demo judge", "hash": "abc123"}, "floor": {"100": 1.0}, "seeds": {"noise": 0}}
    return Results(list(rows), protocol, **changes)


def student(**changes: Any) -> Row:
    return replace(ROW, model="student", **changes)


def test_reads_back_as_written(tmp_path: Path) -> None:
    written = results(ROW, student(frechet=0.1 + 0.2), notes=["a note"])
    written.write(tmp_path / "new" / "results.json")
    assert Results.read(tmp_path / "new" / "results.json") == written
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["results.json"]
    data = json.loads((tmp_path / "new" / "results.json").read_text())
    assert data["schema"] == 1
    assert data["rows"][0]["seconds"] == [0.3, 0.1, 0.2]  # raw, in the order taken


def test_environment_says_what_the_seconds_belong_to() -> None:
    import torch

    here = environment()
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert {"python", "platform", "machine", "cpus", "accelerator"} < here.keys()


def test_median_seconds() -> None:
    assert ROW.seconds_p50 == 0.2


def test_ratio_needs_a_baseline_at_the_same_steps_and_n() -> None:
    table = results(ROW, student(frechet=10.5), student(steps=8, frechet=10.5), student(n=50, frechet=10.5))
    table.protocol["floor"]["50"] = 1.0
    assert [table.ratio(row) for row in table.rows] == ["", "0.50", "", ""]


@pytest.mark.parametrize(("ours", "teachers"), [(4.9, 20.0), (20.0, 4.9), (0.9, 0.8)])
def test_no_ratio_at_the_floor(ours: float, teachers: float) -> None:
    table = results(replace(ROW, frechet=teachers), student(frechet=ours))
    assert table.ratio(table.rows[1]) == AT_THE_FLOOR
    assert AT_THE_FLOOR in table.markdown()
    assert "* within 5 floors" in table.markdown()


def test_markdown_lines_up_and_says_everything() -> None:
    text = results(ROW, student(steps=16, frechet=123.4), student(frechet=10.5), notes=["Timed at night."]).markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1  # every bar in one column
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["model", "steps", "guidance", "evaluations"]
    assert cells[2] == [
        "teacher",
        "4",
        "3",
        "8",
        "20 [18.5, 21.2]",
        "",
        "37.5% [30.0%, 45.0%]",
        "50.0%",
        "75.0%",
        "0.2",
        "100",
    ]
    assert cells[4][5] == "0.50"
    for words in ("demo judge (abc123)", "1 at N = 100", "95 % bootstrap", "Timed at night."):
        assert words in text
    assert "within 5 floors" not in text


def test_no_nan_in_a_file() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        results(replace(ROW, frechet=float("nan"))).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "with a schema number"),
        ("[]", "with a schema number"),
        ("{}", "with a schema number"),
        ('{"schema": 99}', "schema 1, got 99"),
        ('{"schema": 1, "rows": [{"model": "x"}]}', "fields of schema 1"),
        ('{"schema": 1, "rows": [], "protocoll": {}}', "fields of schema 1"),
        (None, "got nothing at"),
    ],
)
def test_what_is_no_results_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Results.read(path)
