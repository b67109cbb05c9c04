"""The benchmark of cached teachers: one data set for both sides, a bound that is one, and bytes as they are on disk."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stepdistill.config import parse
from stepdistill.data.text import Example, Texts
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--k", "8,300", "--rows", "6", "--block_size", "16", "--batch", "2", "--vocabulary", "300"),
    *("--teacher", "2,64", "--student", "1,32", "--repeats", "3"),
]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The script, which imports others by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("cached_teacher")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("cached_teacher", "step_cost", "step_setting", "by_hand"):
        sys.modules.pop(name, None)


def test_rows_say_what_of(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once for each look: every step then takes one tick."""
    ticks = iter(range(10_000))
    texts = [Example("".join(chr(97 + i * j % 26) for j in range(40))) for i in range(9)]
    monkeypatch.setattr(benchmark.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(benchmark, "open_texts", lambda _: Texts(texts, texts))
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda _: None)
    benchmark.main(parse(benchmark.Benchmark, [*TINY, "--output", str(tmp_path / "found.json")]))
    assert next(ticks) == 2 * 2 * (1 + 3)
    found = json.loads((tmp_path / "found.json").read_text())
    (row,) = found["rows"]
    assert row["values"] == [1.0, 1.0] and row["n"] == 3 and row["interval"] is None
    # the same student, nearly, on the same text: less than the whole divergence
    assert all(0 < few < all_ for few, all_ in zip(row["losses"]["cached"], row["losses"]["live"], strict=True))
    assert (
        found["protocol"]["tokens"] == 6 * 15 and found["storage"]["dense"]["fp16"] == 2 * found["protocol"]["entries"]
    )
    few, whole = found["storage"]["caches"]
    assert 4 * 8 + 2 < few["bytes_per_token"] < 4 * 8 + 2 + 5 and whole["k"] == 300
    assert few["bytes_per_token"] == few["bytes"] / 90


@pytest.mark.parametrize("more", [["--k", "0"], ["--rows", "1"], ["--repeats", "0"]])
def test_sizes_that_measure_nothing(benchmark: ModuleType, more: list[str]) -> None:
    with pytest.raises(InputError, match="of at least 1"):
        parse(benchmark.Benchmark, [*TINY, *more])
