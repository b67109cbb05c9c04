"""The curve of steps against quality on a Gaussian: formula, stock scheduler and harness agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from stepdistill.config import parse
from stepdistill.errors import InputError

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "steps_vs_quality.py"
SHIPPED = PATH.parent / "results" / "steps_vs_quality.json"


@pytest.fixture(scope="module")
def curve() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("steps_vs_quality", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["steps_vs_quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("steps", "known"), [(1, 0.0701), (2, 0.0475), (4, 0.0257), (8, 0.0118), (50, 0.0021)])
def test_the_formula_is_the_known_curve(curve: ModuleType, steps: int, known: float) -> None:
    assert curve.wasserstein(*curve.exact(curve.teacher(), steps)) == pytest.approx(known, abs=2e-4)


def test_a_perfect_student_scores_what_the_noise_table_leaks(curve: ModuleType) -> None:
    """At t = 1 the table keeps a little of the data's mean, which N(0, 1) doesn't have; nothing else is lost."""
    mean, std = curve.exact(curve.teacher(), None)
    leak = float(curve.table()[-1].sqrt())
    scale = (leak**2 * 0.09 + 1 - leak**2) ** 0.5
    assert (mean, std) == (pytest.approx(2.0 - 2.0 * leak * 0.3 / scale), pytest.approx(0.3 / scale))
    assert curve.wasserstein(mean, std) < curve.wasserstein(*curve.exact(curve.teacher(), 50))


def test_the_stock_scheduler_and_the_harness_give_the_formula(curve: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    flags = ["--steps", "50,4,1", "--images", "200", "--repeats", "2", "--output", str(path)]
    curve.main(parse(curve.Benchmark, flags))
    rows = json.loads(path.read_text())["rows"]
    assert [(r["model"], r["steps"]) for r in rows] == [
        ("teacher", 50),
        ("teacher", 4),
        ("teacher", 1),
        (curve.PERFECT, 1),
    ]
    for row in rows:
        assert row["measured"] == pytest.approx(row["exact"], abs=1e-9)
    assert rows[0]["noisy"] == {} and rows[2]["noisy"]["200"]["told apart"] == 1.0


def test_what_ships_was_written_by_it_and_its_intervals_are_right(curve: ModuleType) -> None:
    data = json.loads(SHIPPED.read_text())
    asked, default = data["protocol"], curve.Benchmark()
    assert asked["repeats"] == default.repeats and asked["images"] == list(default.images)
    for row in data["rows"]:
        assert row["measured"] == pytest.approx(row["exact"], abs=1e-3)
        for n, found in row["noisy"].items():
            assert found["holds the truth"] >= (0.85 if n == "100" else 0.9)


def test_what_makes_no_sense_is_refused(curve: ModuleType) -> None:
    for flags in (["--steps", "50"], ["--images", "4"], ["--repeats", "-1"], ["--steps", "0,1"]):
        with pytest.raises(InputError, match="--steps"):
            parse(curve.Benchmark, flags)
