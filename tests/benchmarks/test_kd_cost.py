"""The benchmark of the distillation loss: the sides that are installed find one loss, in turns; masked tokens are left out."""

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
from torch.testing import assert_close

from stepdistill.config import parse
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("by_hand", "step_setting", "step_cost", "metric_sides", "metric_cost", "kd_sides", "kd_cost")
TINY = [
    *("--tokens", "12,20", "--vocabulary", "30", "--student_width", "4", "--teacher_width", "6"),
    *("--repeats", "11", "--processes", "2"),
]


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    """The script, which imports others by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("kd_cost")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        sys.modules.pop(name, None)


def dense(setting: Any) -> torch.Tensor:
    """Another side, that is always installed."""
    student, teacher = (
        torch.softmax(h @ w.t(), -1)[setting.mask]
        for h, w in ((setting.hidden, setting.weight), (setting.teacher_hidden, setting.teacher_weight))
    )
    m = (student + teacher) / 2
    return ((student * (student / m).log() + teacher * (teacher / m).log()) / 2).sum() / setting.mask.sum()


def here(function: Any, *arguments: Any) -> Any:
    """Instead of `alone`: peaks in this process mean nothing."""
    side, tokens, valid, _ = arguments
    return int((100 if side == "ours" else 400) * tokens * (1 + valid))


def test_inputs_are_drawn_alike_with_the_share_of_valid_tokens(cost: ModuleType) -> None:
    options = cost.Benchmark(vocabulary=30, student_width=4, teacher_width=6)
    whole, part = options.setting(12), options.setting(12, 0.25)
    assert whole.mask.all() and part.mask.nonzero().flatten().tolist() == [3, 7, 11]
    assert part.labels.tolist() == [1 if i in (3, 7, 11) else -100 for i in range(12)]
    assert_close(whole.hidden, part.hidden, rtol=0, atol=0)
    assert whole.weight.shape == (30, 4) and whole.teacher_weight.shape == (30, 6)
    assert_close(cost.SIDES["ours"](part), dense(part), rtol=1e-5, atol=1e-6)


def test_every_installed_side_finds_one_loss(cost: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's and Liger's where they are."""
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    setting = cost.Benchmark(vocabulary=30, student_width=4, teacher_width=6).setting(12, 0.5)
    wanted = dense(setting)
    gradients = [g.clone() for g in setting.gradients(wanted)]
    sides = importlib.import_module("kd_sides").available()
    assert sides[0] == "ours"
    for side in sides:
        loss = cost.SIDES[side](setting)
        assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        assert_close(list(setting.gradients(loss)), gradients, rtol=1e-4, atol=1e-6)


def test_rows_say_what_of(
    cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that ticks once for each look: every loss then takes one tick."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(cost.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(cost, "alone", here)
    monkeypatch.setattr(cost, "quiet", lambda: None)
    monkeypatch.setattr(cost, "available", lambda: ["ours", "dense"])
    monkeypatch.setattr(cost, "installed", lambda: {"dense": "1.2"})
    monkeypatch.setitem(cost.SIDES, "dense", dense)
    cost.main(parse(cost.Benchmark, [*TINY, "--output", str(tmp_path / "cost.json")]))
    assert next(ticks) == 2 * 2 * 3 * 11  # two looks, two numbers of tokens, three sides
    results = json.loads((tmp_path / "cost.json").read_text())
    assert results["environment"]["dense"] == "1.2" and "output" not in results["protocol"]
    rows = {(row["what"], row["network"], row["quantity"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 2 * 4
    for tokens in (12, 20):
        row = rows["ours / dense", f"N = {tokens}", "CPU time"]
        assert (row["values"], row["ratio"], row["n"]) == ([1.0, 1.0], 1.0, 11)
        assert row["found"]["ours"] == pytest.approx(row["found"]["dense"], rel=1e-4) and row["found"]["ours"][0] > 0
        row = rows["ours / dense", f"N = {tokens}", "peak memory"]
        assert (row["values"], row["ratio"], row["n"]) == ([200 * tokens, 800 * tokens], 0.25, 2)
        row = rows["25% valid / all valid", f"N = {tokens}", "peak memory"]
        assert row["values"] == [125 * tokens, 200 * tokens]
        assert rows["25% valid / all valid", f"N = {tokens}", "CPU time"]["values"] == [1.0, 1.0]
    assert "written to" in capsys.readouterr().out


def test_what_is_not_installed_is_left_out_and_said(cost: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def nowhere(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nowhere)
    with pytest.warns(UserWarning, match="is not installed; pip install"):
        assert importlib.import_module("kd_sides").available() == ["ours"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", ""], "of at least 1"),
        (["--tokens", "5,0"], "of at least 1"),
        (["--vocabulary", "0"], "of at least 1"),
        (["--repeats", "0"], "of at least 1"),
        (["--valid", "0"], r"--valid in \(0, 1\]"),
        (["--valid", "1.5"], r"--valid in \(0, 1\]"),
    ],
)
def test_sizes_that_measure_nothing(cost: ModuleType, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(cost.Benchmark, arguments)


@pytest.mark.slow
def test_a_peak_is_that_of_a_chunk_and_the_gradients(cost: ModuleType) -> None:
    """In a new process: the head's gradient and two chunks of logits, for 1,000 tokens hardly more than for 500."""
    options = cost.Benchmark(vocabulary=20_000, student_width=256, teacher_width=256)
    few, many = (cost.alone(cost.peak, "ours", n, 1.0, options) for n in (500, 1000))
    wanted = 4 * 20_000 * (256 + 2 * 256)
    assert 0.9 * wanted < few < 1.5 * wanted
    assert abs(many - few) < 0.1 * wanted < 0.6 * 500 * 4 * 20_000
