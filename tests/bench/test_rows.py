"""Results read back as they were written, and state no ratio that the floor doesn't allow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepdistill.bench.environment import environment
from stepdistill.bench.rows import SCHEMA, Cell, Quality, Results, Speed, Value
from stepdistill.errors import InputError

REAL = {
    "fd": {"value": 1.0, "interval": [1 - 0.392, 1 + 0.392]},
    "recall": {"value": 0.95, "interval": None},
}


def row(model: str = "teacher", steps: int = 4, guidance: float = 3.0, fd: float = 20.0, n: int = 100) -> Quality:
    return Quality(
        Cell(model, steps, guidance), n, 8.0, {"fd": Value(fd, (fd - 1.5, fd + 1.25)), "recall": Value(0.875)}
    )


def results(*rows: Quality, **changes: Any) -> Results:
    protocol = {
        "features": {"name": "demo judge", "hash": "abc123", "dim": 4},
        "prompts": {"source": "here.txt", "count": 100, "hash": "f00"},
        "reference": {"source": "world", "count": 7},
        "seeds": {"noise": 0},
        "real": {"100": REAL},
    }
    return Results(list(rows), **{"protocol": protocol, **changes})


def speed(cell: Cell, *seconds: float, batch_size: int = 1, **changes: Any) -> Speed:
    return Speed(cell, batch_size, seconds, {"text": (0.01,), "denoiser": (0.2, 0.3)}, 8.0, **changes)


CELL = Cell("teacher", 50, 2.5)


def test_reads_back_as_written(tmp_path: Path) -> None:
    written = results(
        replace(row(fd=0.1 + 0.2), against=Value(1.5, (-0.5, 3.5))),
        row("student"),
        speed=[speed(CELL, 0.3, 0.1, 0.2, first_call=2.5, peak_memory=10**9), speed(CELL, 1.0, batch_size=4)],
        teacher=CELL,
        samples={CELL.slug: {"accuracy": [0.0, 1.0, 1e-17], "clip_score": []}},
        notes=["a note with [1,  2] in it", "é"],
    )
    written.write(tmp_path / "new" / "results.json")
    assert Results.read(tmp_path / "new" / "results.json") == written
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["results.json"]
    text = (tmp_path / "new" / "results.json").read_text()
    data = json.loads(text)
    assert data["schema"] == SCHEMA == 3 and data["fingerprint"] == written.fingerprint
    assert data["speed"][0]["seconds"] == [0.3, 0.1, 0.2]  # raw, in the order taken
    assert '"seconds": [ 0.3, 0.1, 0.2 ]' in text  # numbers don't take a line each


def test_results_without_teacher_or_speed_read_back(tmp_path: Path) -> None:
    written = results(row())
    written.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == written


def test_environment_says_what_the_seconds_belong_to() -> None:
    import torch

    here = environment()
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert {"python", "platform", "machine", "cpus", "accelerator"} < here.keys()


def test_seconds_an_image_are_those_of_a_call_over_its_batch() -> None:
    found = speed(CELL, 0.3, 0.1, 0.2, batch_size=2).image
    assert found == pytest.approx({"p50": 0.1, "p90": 0.14, "p99": 0.149})


def test_no_two_cells_have_one_slug() -> None:
    """Slugs name folders: whatever models are called, they stay apart and inside."""
    models = ["a b", "a_b", "a/b", "..", ".", "...", "../a_b", "a\\b", "é", "a:b", "A B", ".a", "a"]
    slugs = [Cell(model, 4, 2.0).slug for model in models]
    assert len(set(slugs)) == len(models)
    assert all(not slug.startswith(".") and not set(slug) & set("/\\: ") for slug in slugs)
    assert Cell("teacher", 50, 2.5).slug == "teacher-50-2.5"  # plain names stay plain
    assert {Cell("a", 4, 2.5).slug, Cell("a", 4, 2.0).slug, Cell("a", 45, 2.5).slug} == {"a-4-2.5", "a-4-2", "a-45-2.5"}


def test_a_cell_in_words() -> None:
    assert str(CELL) == "teacher, 50 steps, guidance 2.5"
    assert str(Cell("x", 1, 3.0)) == "x, 1 step, guidance 3"


def changed(**facts: Any) -> Results:
    base = results()
    return replace(base, protocol={**base.protocol, **facts})


def test_the_fingerprint_is_that_of_what_must_be_equal() -> None:
    base = results().fingerprint
    elsewhere = {"source": "there.txt", "count": 100, "hash": "f00"}  # the same prompts in another place
    assert changed(real={}).fingerprint == base and changed(prompts=elsewhere).fingerprint == base
    others = [
        changed(prompts={**elsewhere, "hash": "f01"}),
        changed(prompts={**elsewhere, "count": 99}),
        changed(seeds={"noise": 1}),
        changed(reference={"source": "elsewhere", "count": 7}),  # no hash: the source is all there is
        changed(features={"name": "demo judge", "hash": "abc124", "dim": 4}),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6
    assert results().protocol["prompts"]["source"] == "here.txt"


def test_a_row_is_found_by_cell_and_number() -> None:
    small, large = row(n=50), row(n=100)
    table = results(small, large, row("student"))
    assert table.of(small.cell, 50) is small and table.of(small.cell, 100) is large
    assert table.of(small.cell, 51) is None and table.of(Cell("teacher", 4, 2.0), 50) is None


def test_the_floor_and_its_spread() -> None:
    assert results(row()).floor(100) == pytest.approx((1.0, 0.2))  # 1.96 standard deviations either side
    assert results(row()).floor(50) is None
    assert changed(real={"100": {"fd": {"value": 1.0, "interval": None}}}).floor(100) is None
    assert results(row()).real(100, "recall") == Value(0.95) and results(row()).real(100, "kid") is None
    nothing = results(row(), protocol={"features": {}})
    assert nothing.floor(100) is None and nothing.times_best(nothing.quality[0]) is None


def test_times_best_is_over_the_lowest_of_all_guidances_less_the_floor() -> None:
    table = results(
        row(steps=50, fd=7.0), row(steps=50, guidance=2.0, fd=5.0), row(fd=9.0), row("s", fd=7.0), row("s", fd=3.0),
        row("s", fd=7.0, n=50),
    )  # fmt: skip
    assert [table.times_best(r) for r in table.quality] == pytest.approx([1.5, 1.0, 2.0, 1.5, 0.5, None])


@pytest.mark.parametrize(("ours", "best", "clear"), [(2.01, 20.0, True), (1.99, 20.0, False), (20.0, 1.99, False)])
def test_no_ratio_within_five_deviations_of_the_floor(ours: float, best: float, clear: bool) -> None:
    table = results(row(fd=best), row("student", fd=ours))
    assert (table.times_best(table.quality[1]) is not None) == clear


def test_gap_closed_is_measured_from_the_best_guidance_at_the_same_steps() -> None:
    table = results(
        row(steps=50, fd=5.0), row(steps=2, fd=35.0), row(steps=2, guidance=1.0, fd=25.0), row("s", 2, fd=10.0),
        row("s", 2, fd=5.0), row("s", 2, fd=30.0), row("s", 3),
    )  # fmt: skip
    assert [table.gap_closed(r) for r in table.quality] == [None, None, None, 0.75, 1.0, -0.25, None]


@pytest.mark.parametrize(("same", "stated"), [(6.01, True), (5.99, False)])
def test_no_share_of_a_gap_that_is_none(same: float, stated: bool) -> None:
    table = results(row(steps=50, fd=5.0), row(steps=8, fd=same), row("student", 8, fd=5.0))
    assert (table.gap_closed(table.quality[2]) is not None) == stated


def test_a_floor_without_spread_divides_by_nothing() -> None:
    exact = {"100": {"fd": {"value": 1.0, "interval": [1.0, 1.0]}}}
    table = results(row(fd=1.0), row("student", fd=1.0), protocol={"real": exact})
    assert table.times_best(table.quality[1]) is None and table.gap_closed(table.quality[1]) is None


def test_no_shares_without_the_teacher_the_distance_or_real_images_at_this_number() -> None:
    alone = results(row("student"))
    assert alone.times_best(alone.quality[0]) is None and alone.gap_closed(alone.quality[0]) is None
    fewer = results(row(n=50), row("student", n=50))
    assert fewer.times_best(fewer.quality[1]) is None and fewer.gap_closed(fewer.quality[1]) is None
    without = replace(row("student"), values={"recall": Value(0.5)})
    table = results(row(), replace(row(steps=50), values={}), without)
    assert table.times_best(without) is None and table.gap_closed(without) is None
    assert table.best(100) is table.quality[0]


def test_no_nan_in_a_file() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        results(row(fd=float("nan"))).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "with a schema number"),
        ("[]", "with a schema number"),
        ("{}", "with a schema number"),
        ('{"schema": 2, "rows": []}', "schema 3, got 2"),
        ('{"schema": 3, "quality": [{"model": "x"}], "speed": []}', "fields of schema 3"),
        ('{"schema": 3, "quality": [{"values": []}], "speed": [], "teacher": null}', "fields of schema 3"),
        ('{"schema": 3, "quality": [], "speed": [], "teacher": null, "protocoll": {}}', "fields of schema 3"),
        ('{"schema": 3, "quality": [], "speed": []}', "fields of schema 3"),
        (None, "got nothing at"),
    ],
)
def test_what_is_no_results_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Results.read(path)


def test_a_folder_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give its results.json"):
        Results.read(tmp_path)
