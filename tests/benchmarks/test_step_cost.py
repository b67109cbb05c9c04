"""The benchmark compares like with like, in turns, and writes what it found."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from students import randomised

from stepdistill.batch import Batch
from stepdistill.config import parse
from stepdistill.errors import InputError
from stepdistill.randomness import StepRandom

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("by_hand", "step_setting", "step_cost")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """The scripts, which import one another by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tiny(benchmarks: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> str:
    setting = benchmarks["step_setting"]
    path: str = setting.save_pipeline(tmp_path_factory.mktemp("tiny"), setting.UNETS["tiny"], seed=0)
    return path


def test_the_loop_by_hand_has_the_loss_of_the_method(benchmarks: dict[str, ModuleType], tiny: str) -> None:
    setting = benchmarks["step_setting"].Setting(tiny, batch=8, seed=0)
    randomised(setting.method.student)
    rng = StepRandom(0, 5, range(8))
    mean, _, embeds = (values[:8] for values in setting.data.cached)
    cond = {"prompt_embeds": embeds}
    loss = setting.method.training_step(Batch(mean, cond, setting.model.uncond(cond), rng)).total
    by_hand = benchmarks["by_hand"].ByHand(
        setting.method, setting.data.cached, setting.model.encode_prompts([""])["prompt_embeds"], 8
    )
    w = (5.0 + 10.0 * rng.uniform("guidance")).float().reshape(-1, 1, 1, 1)
    k = rng.integers("time", 0, 50)
    torch.testing.assert_close(by_hand.loss(mean, rng.normal("noise", mean.shape[1:]), k, w, embeds), loss)


def test_both_sides_take_turns(benchmarks: dict[str, ModuleType], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once for each look at it: a step of each side then takes one tick, and none is lost."""
    module, cost = benchmarks["step_setting"], benchmarks["step_cost"]
    ticks = iter(range(1000))
    monkeypatch.setattr(module, "clock", lambda: float(next(ticks)))
    ours, theirs = cost.trainer_and_by_hand(module.Setting(tiny, batch=2, seed=0), steps=5)
    assert list(ours) == list(theirs) == [1.0, 1.0]
    assert next(ticks) == 4 * 5  # two looks a step of each side


@pytest.fixture
def spend(benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only moves when seconds are spent by this."""
    now = [0.0]
    monkeypatch.setattr(benchmarks["step_setting"], "clock", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_every_other_step_encodes(
    benchmarks: dict[str, ModuleType], tiny: str, spend: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = benchmarks["step_setting"].Setting(tiny, batch=2, seed=0)
    encode = setting.data.encode
    monkeypatch.setattr(setting.data, "encode", lambda chosen: (spend(len(chosen)), encode(chosen))[1])
    cached, fresh = benchmarks["step_cost"].cached_and_encoded(setting, steps=5)
    assert (list(cached), list(fresh)) == ([0.0, 0.0], [2.0, 2.0])
    rng = StepRandom(0, 1, range(2))
    encoded = setting.data.batch([3, 9], rng)
    setting.data.encodes = lambda step: False
    kept = setting.data.batch([3, 9], rng)
    torch.testing.assert_close(encoded.x0, kept.x0)
    torch.testing.assert_close(encoded.cond, kept.cond)


def test_every_other_teacher_is_a_copy(
    benchmarks: dict[str, ModuleType], tiny: str, spend: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, cost = benchmarks["step_setting"].Setting(tiny, batch=2, seed=0), benchmarks["step_cost"]
    step = setting.method.training_step

    def training_step(batch: Batch) -> Any:
        spend(1.0 if setting.method.teacher is setting.model.denoiser else 2.0)
        return step(batch)

    monkeypatch.setattr(setting.method, "training_step", training_step)
    shared, copied = cost.shared_and_copied(setting, steps=5)
    assert (list(shared), list(copied)) == ([1.0, 1.0], [2.0, 2.0])
    (one,), (two,) = cost.weights(setting)
    base = sum(p.numel() * 4 for n, p in setting.model.denoiser.module.named_parameters() if "lora_" not in n)
    assert two - one == base


def test_a_ratio_by_hand(benchmarks: dict[str, ModuleType]) -> None:
    compare = benchmarks["step_cost"].compare
    ours, theirs = [1.0, 2.0, 9.0], [1.0, 1.0, 3.0]
    row = compare("a / b", "demo", "peak memory", (ours, theirs), 0)
    assert (row.ratio, row.interval, row.values, row.n) == (2.0, None, (2.0, 1.0), 3)
    row = compare("a / b", "demo", "CPU time", (ours * 4, theirs * 4), 0)
    assert row.interval is not None
    assert 1.0 <= row.interval[0] < 2.0 < row.interval[1] <= 3.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare("a / b", "demo", "CPU time", ([1.0, 2.0], [1.0]), 0)


@pytest.mark.parametrize("arguments", [["--steps", "3"], ["--repeats", "0"]])
def test_too_few_steps(benchmarks: dict[str, ModuleType], arguments: list[str]) -> None:
    with pytest.raises(InputError, match="expected steps > 3 and repeats >= 1"):
        parse(benchmarks["step_cost"].Benchmark, arguments)


def measured(benchmarks: dict[str, ModuleType], path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A results file of two made-up rows, written as the benchmark writes it."""
    cost = benchmarks["step_cost"]
    rows = [
        cost.Row("trainer / loop by hand", "demo", "CPU time", 1.0234, (1.01, 1.04), (0.2, 0.195), 171),
        cost.Row("one base / two copies", "demo", "weights", 0.5, None, (2**20, 2**21), 1),
    ]
    monkeypatch.setattr(cost, "measure", lambda options, paths: iter(rows))
    monkeypatch.setattr(cost, "save_pipeline", lambda folder, unet, seed: "")
    cost.main(parse(cost.Benchmark, ["--output", str(path), "--steps", "9"]))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_file_says_how_it_was_made(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = measured(benchmarks, tmp_path / "step_cost.json", monkeypatch)
    assert results["protocol"]["steps"] == 9
    assert {"repeats", "batch", "seed", "warmup", "rank", "unets"} <= results["protocol"].keys()
    assert results["environment"]["threads"] == 1
    assert results["rows"][0]["ratio"] == 1.0234
    assert str(tmp_path) not in json.dumps(results)


@pytest.mark.slow
def test_peaks_are_of_processes_of_their_own(benchmarks: dict[str, ModuleType], tiny: str) -> None:
    cost = benchmarks["step_cost"]
    ballast = torch.ones(2**28)  # 1 GiB that the new process must not be charged with
    (ours,), (theirs,) = cost.peaks(cost.BY_HAND, tiny, cost.Benchmark(steps=4, repeats=1, batch=2))
    assert ballast[0] == 1.0
    for value in (ours, theirs):
        assert 2**20 < value < 2**29
