"""The benchmark of the Frechet distance: all sides measure one distance, in turns; memory doesn't grow with the features."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stepdistill.config import parse
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("by_hand", "step_setting", "step_cost", "metric_sides", "metric_cost")
TINY = ["--counts", "30,60", "--dims", "3,5", "--features", "70", "--batch", "20", "--processes", "2"]


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    """The script, which imports others by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("metric_cost")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        sys.modules.pop(name, None)


def here(function: Any, *arguments: Any) -> Any:
    """Instead of `alone`: in this process, whose peaks mean nothing."""
    if function.__name__ == "peak":
        side, n, dim, _ = arguments
        return 100 * dim + (n if side == "torchmetrics" else 0)
    return function(*arguments)


def test_the_sides_find_one_distance(cost: ModuleType) -> None:
    sides = cost.distances(cost.drawn(400, 6, 0), batch=150)
    features = 1.5 * cost.drawn(300, 6, 1) + 0.3
    values = {side: distance(features) for side, distance in sides.items()}
    assert values.keys() == {"ours", "torchmetrics", "scipy"}
    assert 6 * (0.3**2 + 0.25) * 0.8 < values["ours"] < 6 * (0.3**2 + 0.25) * 1.4
    for value in values.values():
        assert value == pytest.approx(values["ours"], rel=1e-9)
    assert {side: distance(features) for side, distance in sides.items()} == values  # nothing is left of the first call


def test_sides_take_turns_and_rows_say_what_of(
    cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that ticks once for each look: every distance then takes one tick."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(cost.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(cost, "alone", here)
    cost.main(parse(cost.Benchmark, [*TINY, "--repeats", "11", "--output", str(tmp_path / "cost.json")]))
    assert next(ticks) == 2 * 2 * 3 * 11  # two looks, two dimensions, three sides
    results = json.loads((tmp_path / "cost.json").read_text())
    assert results["protocol"]["counts"] == ["30", "60"] and "output" not in results["protocol"]
    rows = {(row["what"], row["network"], row["quantity"]): row for row in results["rows"]}
    memory = [rows["ours / torchmetrics", "d = 5", f"peak memory, N = {n}"] for n in (30, 60)]
    assert [row["values"] for row in memory] == [[500, 530], [500, 560]]
    assert [row["n"] for row in memory] == [2, 2] and memory[0]["interval"] is None
    for dim in (3, 5):
        for side in ("torchmetrics", "scipy"):
            row = rows[f"ours / {side}", f"d = {dim}", "CPU time, N = 70"]
            assert (row["values"], row["ratio"], row["interval"], row["n"]) == ([1.0, 1.0], 1.0, [1.0, 1.0], 11)
            assert (
                row["distances"]["ours"] == pytest.approx(row["distances"][side], rel=1e-6)
                and row["distances"]["ours"] > 0
            )
    assert len(rows) == 6
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--counts", ""],
        ["--counts", "100,0"],
        ["--dims", "0"],
        ["--features", "1"],
        ["--repeats", "0"],
        ["--batch", "0"],
    ],
)
def test_sizes_that_measure_nothing(cost: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(InputError, match="of at least 1 and --features of at least 2"):
        parse(cost.Benchmark, arguments)


@pytest.mark.slow
def test_peaks_are_those_of_the_sums_alone(cost: ModuleType) -> None:
    """In new processes: about one d x d matrix for 500 features as for 20,000, and not what this process holds."""
    options, dim = cost.Benchmark(batch=100), 1024
    held = torch.ones(2**27)
    matrix = 8 * dim**2
    few, many = (cost.alone(cost.peak, "ours", n, dim, options) for n in (500, 20_000))
    assert held[0] == 1
    assert matrix < few < 1.6 * matrix
    assert abs(many - few) < 0.2 * matrix < 0.02 * 20_000 * dim * 8
    theirs = cost.alone(cost.peak, "torchmetrics", 500, dim, options)
    assert theirs > 1.5 * few
