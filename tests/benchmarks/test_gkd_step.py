"""The benchmark of a GKD step: both sides train one pair on one text in one order, and it is checked that they do one work."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stepdistill.config import parse
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("by_hand", "step_setting", "step_cost", "gkd_sides", "gkd_step")
TINY = ["--vocabulary", "40", "--batch", "2", "--prompt", "3", "--new", "5", "--steps", "14"]


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    """The script, which imports others by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("gkd_step")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        sys.modules.pop(name, None)


def setting(cost: ModuleType, lmbda: float) -> Any:
    return cost.Setting(vocabulary=40, lmbda=lmbda, batch=2, prompt=3, new=5, beta=0.5, seed=0)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_our_steps_take_the_rows_in_the_order_that_the_other_side_gets_them(
    cost: ModuleType, monkeypatch: pytest.MonkeyPatch, lmbda: float
) -> None:
    sides, one, found, seen = sys.modules["gkd_sides"], setting(cost, lmbda), cost.Found(), []
    learn = sides.Noted.training_step

    def watched(self: Any, batch: Any) -> Any:
        seen.append((batch.extra["prompt_ids"], batch.extra["input_ids"]))
        return learn(self, batch)

    monkeypatch.setattr(sides.Noted, "training_step", watched)
    for step, _ in enumerate(sides.ours(one, 3, found), 1):
        assert len(found.seconds) == len(found.losses) == step
    assert found.tokens == [2 * 5] * 3, "no text ends before"
    rows = one.in_order(3)
    for step, (prompts, ids) in enumerate(seen):
        given = sides.collated(rows[2 * step : 2 * step + 2])
        assert_close((given["prompts"], given["input_ids"]), (prompts, ids), rtol=0, atol=0)
        assert given["labels"].tolist() == torch.cat([torch.full((2, 3), -100), ids[:, 3:]], 1).tolist()
    assert found.losses[0] != found.losses[-1], "it trains"


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_both_sides_find_the_same_losses_in_turns(cost: ModuleType) -> None:
    cost.quiet()
    for lmbda in (0.0, 1.0):
        mine, theirs = cost.turns(setting(cost, lmbda), 3)
        assert len(mine.seconds) == len(theirs.seconds) == 3
        about = cost.same_work(setting(cost, lmbda), mine, theirs)
        assert about["tokens"] == 10 and ("largest difference of losses" in about) == (lmbda == 0.0)


def test_steps_of_other_work_are_not_compared(cost: ModuleType) -> None:
    data, own = setting(cost, 0.0), setting(cost, 1.0)
    good = cost.Found([1.0, 1.0], [0.5, 0.4], [10, 10])
    apart = replace(good, losses=[0.5, 0.4001])
    about = cost.same_work(data, good, replace(good, losses=[0.5, 0.400001]))
    assert about["largest difference of losses"] == pytest.approx(1e-6, rel=1e-3)
    assert about["mean loss"] == pytest.approx([0.45, 0.4500005]) and about["first loss"] == [0.5, 0.5]
    assert cost.same_work(own, good, apart)["mean loss"][1] == pytest.approx(0.45005), "samples differ there"
    with pytest.raises(RuntimeError, match="losses within"):
        cost.same_work(data, good, apart)
    with pytest.raises(RuntimeError, match="losses within"):
        cost.same_work(data, good, replace(good, losses=[0.5, float("nan")]))
    for lmbda in (data, own):
        with pytest.raises(RuntimeError, match="expected 10 tokens"):
            cost.same_work(lmbda, good, replace(good, tokens=[10, 9]))
        with pytest.raises(RuntimeError, match="expected 10 tokens"):
            cost.same_work(lmbda, replace(good, tokens=[9, 10]), good)


def test_rows_say_what_of(
    cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sides of 1 and 4 seconds a step, but for the first ones."""

    def turns(one: Any, steps: int) -> Any:
        losses, tokens = [0.5] * steps, [10] * steps
        return tuple(cost.Found([99.0] * 3 + [s + one.lmbda] * (steps - 3), losses, tokens) for s in (1.0, 4.0))

    monkeypatch.setattr(cost, "turns", turns)
    monkeypatch.setattr(cost, "quiet", lambda: None)
    monkeypatch.setattr(cost, "has_trl", lambda: True)
    monkeypatch.setattr(cost, "version", lambda name: f"{name} 1.2")
    cost.main(parse(cost.Benchmark, [*TINY, "--output", str(tmp_path / "cost.json")]))
    results = json.loads((tmp_path / "cost.json").read_text())
    assert results["environment"]["trl"] == "trl 1.2" and "output" not in results["protocol"]
    assert results["protocol"]["warmup"] == 3
    data, own = results["rows"]
    assert (data["network"], own["network"]) == ("V = 40, lmbda 0", "V = 40, lmbda 1")
    assert (data["ratio"], data["values"], data["n"], data["quantity"]) == (0.25, [1.0, 4.0], 11, "CPU time")
    assert (own["ratio"], own["values"], own["interval"]) == (0.4, [2.0, 5.0], [0.4, 0.4])
    assert data["found"]["largest difference of losses"] == 0.0
    assert "written to" in capsys.readouterr().out


def test_without_trl_nothing_is_measured(cost: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "has_trl", lambda: False)
    with pytest.raises(InputError, match="peers"):
        cost.main(parse(cost.Benchmark, [*TINY, "--output", str(tmp_path / "cost.json")]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocabulary", ""], "of at least 1"), (["--vocabulary", "40,0"], "of at least 1"),
        (["--batch", "0"], "of at least 1"), (["--new", "0"], "of at least 1"), (["--steps", "3"], "fix --steps"),
    ],
)  # fmt: skip
def test_sizes_that_measure_nothing(cost: ModuleType, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(cost.Benchmark, arguments)
