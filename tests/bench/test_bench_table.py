"""The table reads back as it was written, lines up, and states no ratio that the floor doesn't allow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench.table import UNCLEAR, Results, Row, environment
from stepdistill.errors import InputError

ROW = Row(
    model="teacher",
    steps=4,
    guidance=3.0,
    frechet=20.0,
    interval=(18.5, 21.25),
    kid=0.02,
    recall=0.875,
    diversity=3.14159,
    accuracy={"shape": 0.5, "colour": 0.75, "all": 0.375},
    accuracy_interval=(0.3, 0.45),
    seconds=(0.3, 0.1, 0.2),
    evaluations=8.0,
    n=100,
)


def results(*rows: Row, **changes: Any) -> Results:
    real = {
        "frechet": 1.0,
        "interval": [1 - 0.392, 1 + 0.392],
        "recall": 0.95,
        "diversity": 4.0,
        "accuracy": {"all": 1.0},
    }
    protocol = {"features": {"name": "demo judge", "hash": "abc123"}, "real": {"100": real}, "seeds": {"noise": 0}}
    return Results(list(rows), protocol, **changes)


def student(**changes: Any) -> Row:
    return replace(ROW, model="student", **changes)


def test_reads_back_as_written(tmp_path: Path) -> None:
    written = results(ROW, student(frechet=0.1 + 0.2), notes=["a note"])
    written.write(tmp_path / "new" / "results.json")
    assert Results.read(tmp_path / "new" / "results.json") == written
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["results.json"]
    data = json.loads((tmp_path / "new" / "results.json").read_text())
    assert data["schema"] == 2
    assert data["rows"][0]["seconds"] == [0.3, 0.1, 0.2]  # raw, in the order taken


def test_environment_says_what_the_seconds_belong_to() -> None:
    import torch

    here = environment()
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert {"python", "platform", "machine", "cpus", "accelerator"} < here.keys()


def test_median_seconds() -> None:
    assert ROW.seconds_p50 == 0.2


def teacher(**changes: Any) -> Row:
    return replace(ROW, **changes)


def test_the_floor_and_its_spread() -> None:
    floor = results(ROW).floor(100)
    assert floor is not None and floor == pytest.approx((1.0, 0.2))  # 1.96 standard deviations either side
    assert results(ROW).floor(50) is None


def test_times_best_is_over_the_lowest_of_all_guidances_less_the_floor() -> None:
    table = results(
        teacher(steps=50, frechet=7.0), teacher(steps=50, guidance=2.0, frechet=5.0), teacher(frechet=9.0),
        student(frechet=7.0), student(frechet=3.0), student(frechet=7.0, n=50),
    )  # fmt: skip
    assert [table.times_best(row) for row in table.rows] == [1.5, 1.0, 2.0, 1.5, 0.5, None]


@pytest.mark.parametrize(("ours", "best", "clear"), [(2.01, 20.0, True), (1.99, 20.0, False), (20.0, 1.99, False)])
def test_no_ratio_within_five_deviations_of_the_floor(ours: float, best: float, clear: bool) -> None:
    table = results(teacher(frechet=best), student(frechet=ours))
    assert (table.times_best(table.rows[1]) is not None) == clear
    assert (UNCLEAR in table.markdown().split("N |")[1].split("- Frechet")[0]) == (not clear)


def test_gap_closed_is_measured_from_the_best_guidance_at_the_same_steps() -> None:
    table = results(
        teacher(steps=50, frechet=5.0), teacher(steps=2, frechet=35.0), teacher(steps=2, guidance=1.0, frechet=25.0),
        student(steps=2, frechet=10.0), student(steps=2, frechet=5.0), student(steps=2, frechet=30.0), student(steps=3),
    )  # fmt: skip
    assert [table.gap_closed(row) for row in table.rows] == [None, None, None, 0.75, 1.0, -0.25, None]


@pytest.mark.parametrize(("same", "stated"), [(6.01, True), (5.99, False)])
def test_no_share_of_a_gap_that_is_none(same: float, stated: bool) -> None:
    table = results(teacher(steps=50, frechet=5.0), teacher(steps=8, frechet=same), student(steps=8, frechet=5.0))
    assert (table.gap_closed(table.rows[2]) is not None) == stated


def test_no_shares_without_the_teacher_or_real_images_at_this_number() -> None:
    alone = results(student())
    assert alone.times_best(alone.rows[0]) is None and alone.gap_closed(alone.rows[0]) is None
    fewer = results(teacher(n=50), student(n=50))
    assert fewer.times_best(fewer.rows[1]) is None and fewer.gap_closed(fewer.rows[1]) is None


def test_markdown_lines_up_and_says_everything() -> None:
    text = results(
        ROW,
        teacher(steps=1, frechet=101.0),
        student(steps=1, frechet=21.0),
        student(steps=16, seconds=()),
        notes=["Late."],
    ).markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1  # every bar in one column
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["model", "steps", "guidance", "evaluations"]
    first = ["teacher", "4", "3", "8", "20 [18.5, 21.2]", "1.00", "", "0.88", "3.14", "37.5% [30.0%, 45.0%]"]
    assert cells[2] == [*first, "shape 50.0%", "0.2", "100"]
    assert cells[4][5:7] == ["1.05", "99%"]
    assert cells[5][-2] == ""  # not timed
    for words in ("demo judge (abc123)", "100 real images", "distance 1 (the floor)", "95 % bootstrap", "Late."):
        assert words in text


def test_no_nan_in_a_file() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        results(replace(ROW, frechet=float("nan"))).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "with a schema number"),
        ("[]", "with a schema number"),
        ("{}", "with a schema number"),
        ('{"schema": 99}', "schema 2, got 99"),
        ('{"schema": 2, "rows": [{"model": "x"}]}', "fields of schema 2"),
        ('{"schema": 2, "rows": [], "protocoll": {}}', "fields of schema 2"),
        (None, "got nothing at"),
    ],
)
def test_what_is_no_results_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Results.read(path)
