"""The benchmark compares like with like, in turns, and writes what it found."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from adversaries import learning
from students import randomised
from toys import recorded

from stepdistill.batch import Batch
from stepdistill.config import parse
from stepdistill.errors import InputError
from stepdistill.randomness import StepRandom

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (5, 6)  # whose draws are all steps of a rung, first and last too
NAMES = ("by_hand", "step_setting", "step_cost")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """The scripts, which import one another by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    modules = {name: importlib.import_module(name) for name in NAMES}
    modules["step_setting"].SAMPLES = 16  # pictures, all of which each setting encodes
    yield modules
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tiny(benchmarks: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> str:
    setting = benchmarks["step_setting"]
    path: str = setting.save_pipeline(tmp_path_factory.mktemp("tiny"), setting.UNETS["tiny"], seed=0)
    return path


def eight(setting: Any, seed: int) -> tuple[Batch, torch.Tensor, torch.Tensor, StepRandom]:
    """A batch, its latents, embeddings and randomness; the student has moved away from its teacher."""
    randomised(setting.method.student)
    rng = StepRandom(0, seed, range(8))
    mean, _, embeds = (values[:8] for values in setting.data.cached)
    cond = {"prompt_embeds": embeds}
    return Batch(mean, cond, setting.model.uncond(cond), rng), mean, embeds, rng


def test_the_loop_by_hand_has_the_loss_of_the_method(benchmarks: dict[str, ModuleType], tiny: str) -> None:
    setting = benchmarks["step_setting"].Setting(tiny, batch=8, seed=0)
    batch, mean, embeds, rng = eight(setting, 5)
    loss = setting.method.training_step(batch).total
    w = (5.0 + 10.0 * rng.uniform("guidance")).float().reshape(-1, 1, 1, 1)
    k = rng.integers("time", 0, 50)
    torch.testing.assert_close(setting.loop().loss(mean, rng.normal("noise", mean.shape[1:]), k, w, embeds), loss)


@pytest.mark.parametrize(("trained", "k", "rung"), [("FIRST_RUNG", 5, 8), ("SECOND_RUNG", 2, 4)])
def test_the_ladder_by_hand_has_the_loss_and_the_forwards_of_the_method(
    benchmarks: dict[str, ModuleType], tiny: str, trained: str, k: int, rung: int
) -> None:
    module = benchmarks["step_setting"]
    setting = module.Setting(tiny, batch=8, seed=0, trained=getattr(module, trained))
    student, hand = setting.method.student, setting.loop()
    seen: set[int] = set()
    for seed in SEEDS:
        batch, mean, embeds, rng = eight(setting, seed)
        i, noise = rng.integers("time", 0, rung), rng.normal("noise", mean.shape[1:])
        with recorded(student.module) as of_student, recorded(setting.method.teacher.module) as of_teacher:
            ours = setting.method.training_step(batch).total
            theirs = hand.loss(mean, noise, i, embeds)
        torch.testing.assert_close(theirs, ours)
        gradients = (torch.autograd.grad(loss, student.trainable()) for loss in (theirs, ours))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
        size = 16 if trained == "FIRST_RUNG" else 8
        assert [(len(x[0]), grad) for x, grad in of_student] == [(8, True)] * 2
        assert [(len(x[0]), grad) for x, grad in of_teacher] == [(size, False)] * 2 * k
        seen |= set(i.tolist())
    assert seen == set(range(rung))


@pytest.mark.parametrize("trained", ["LADD_FULL", "LADD_LORA"])
def test_the_game_by_hand_has_the_losses_and_the_forwards_of_the_method(
    benchmarks: dict[str, ModuleType], tiny: str, trained: str
) -> None:
    module = benchmarks["step_setting"]
    setting = module.Setting(tiny, batch=8, seed=0, trained=getattr(module, trained))
    method, hand = setting.method, setting.loop()
    method.times = replace(method.times, probabilities=(0.25,) * 4, warmup_steps=0)
    method.taken = 1  # no look of the guard
    batch, mean, embeds, _ = eight(setting, 5)
    with torch.no_grad():
        for parameter in method.discriminator.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    look = method.look(batch)
    index, level = ((1000 * t).round().long() - 1 for t in (look.t, look.level))
    assert index.unique().tolist() == [249, 499, 749, 999]
    of_networks: dict[str, list[tuple[int, bool]]] = {}
    vectors = [b.clone() for b in method.discriminator.module.buffers()]
    theirs = hand.losses(mean, look.x_t, index, look.eps, level, embeds)
    for role, phase in zip(("discriminator", "student"), method.phases(), strict=True):
        parameters = method.networks()[role].trainable()
        with (
            learning(method, role),
            recorded(method.student.module) as ours,
            recorded(method.teacher.module) as of_teacher,
        ):
            loss = phase.loss(batch).total
        wanted = torch.autograd.grad(loss, parameters)
        for network in method.networks().values():
            network.module.requires_grad_(False)
        for parameter in method.student.trainable():
            parameter.requires_grad_(True)
        with recorded(method.student.module) as by_hand, recorded(method.teacher.module) as teacher_by_hand:
            found, other = next(theirs)
        assert found == role
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(other, parameters), wanted, rtol=1e-4, atol=1e-5)
        for calls in (ours, of_teacher, by_hand, teacher_by_hand):
            of_networks.setdefault(role, []).append([(len(x[0]), grad) for x, grad in calls])
    assert next(theirs, None) is None, "two steps"
    assert any(not torch.equal(v, w) for v, w in zip(vectors, method.discriminator.module.buffers(), strict=True))
    for role, size, grad in (("discriminator", 16, False), ("student", 8, True)):
        student, teacher = [(8, grad)], [(size, grad)]
        if trained == "LADD_LORA":  # one module
            student = teacher = [*student, *teacher]
        assert of_networks[role] == [student, teacher] * 2


@pytest.mark.parametrize(("trained", "points"), [("LCM_LORA", 50), ("FIRST_RUNG", 8), ("SECOND_RUNG", 4)])
def test_the_loop_by_hand_draws_every_time_and_the_guidance_of_the_method(
    benchmarks: dict[str, ModuleType], tiny: str, trained: str, points: int
) -> None:
    module = benchmarks["step_setting"]
    loop = module.Setting(tiny, batch=8, seed=0, trained=getattr(module, trained)).loop()
    torch.manual_seed(0)
    x0, embeds = torch.zeros(2000, 4, 8, 8), torch.zeros(2000, 1, 1)
    given = loop.drawn(x0, embeds)
    assert given[0] is x0 and given[-1] is embeds
    torch.testing.assert_close(given[1].std(), torch.tensor(1.0), rtol=0.01, atol=0)
    assert given[2].unique().tolist() == list(range(points))
    if trained == "LCM_LORA":
        low, high = given[3].min(), given[3].max()
        assert 5.0 <= low < 5.1 and 14.9 < high <= 15.0


def test_the_game_by_hand_draws_the_times_and_the_levels_of_the_method(
    benchmarks: dict[str, ModuleType], tiny: str
) -> None:
    module = benchmarks["step_setting"]
    setting = module.Setting(tiny, batch=8, seed=0, trained=module.LADD_FULL)
    hand = setting.loop()
    torch.manual_seed(0)
    embeds, ones = torch.zeros(2000, 1, 1), torch.ones(2000, 4, 8, 8)
    x0, x_t, index, eps, level, last = hand.drawn(ones, embeds)
    assert x0 is ones and last is embeds and index.unique().tolist() == [249, 499], "of the warm-up"
    hand.chances = torch.tensor(setting.method.times.probabilities, dtype=torch.float64)
    _, x_t, index, eps, level, _ = hand.drawn(ones, embeds)
    assert abs(float((index == 999).double().mean()) - 0.7) < 0.05 and len(index.unique()) == 4
    alpha = setting.method.schedule.alpha((index + 1).double() / 1000) * (index != 999)
    torch.testing.assert_close(x_t.mean((1, 2, 3)).double(), alpha, rtol=0, atol=0.35)
    z = torch.logit((level + 1).double().clamp(max=999) / 1000)
    assert abs(float(z.mean()) - 1) < 0.1 and abs(float(z.std()) - 1) < 0.1
    assert abs(float((eps.flatten() * x_t.flatten()).mean())) < 0.02


def test_what_ladd_holds_is_counted_by_hand(benchmarks: dict[str, ModuleType], tiny: str) -> None:
    """A full student five times beside its teacher; of a LoRA the adapter five times on one base; heads four times."""
    module, cost = benchmarks["step_setting"], benchmarks["step_cost"]
    for trained, networks in ((module.LADD_FULL, 2), (module.LADD_LORA, 1)):
        setting = module.Setting(tiny, batch=2, seed=0, trained=trained)
        method = setting.method
        base = sum(4 * p.numel() for n, p in method.teacher.module.named_parameters() if "lora_" not in n)
        heads, student = (sum(4 * p.numel() for p in n.trainable()) for n in (method.discriminator, method.student))
        counters = 4 * sum(len(n.trainable()) for n in method.networks().values())
        buffers = sum(4 * b.numel() for b in method.discriminator.module.buffers())
        own = student if networks == 1 else base
        assert cost.held(setting) == base + 5 * own + 4 * heads + buffers + counters


@pytest.mark.parametrize("trained", ["LCM_LORA", "FIRST_RUNG", "SECOND_RUNG", "LADD_FULL"])
def test_both_sides_take_turns(
    benchmarks: dict[str, ModuleType], tiny: str, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    """By a clock that ticks once for each look at it: a step of each side then takes one tick, and none is lost."""
    module, cost = benchmarks["step_setting"], benchmarks["step_cost"]
    ticks = iter(range(1000))
    monkeypatch.setattr(module, "clock", lambda: float(next(ticks)))
    setting = module.Setting(tiny, batch=2, seed=0, trained=getattr(module, trained))
    loops = []
    loop = module.Setting.loop
    monkeypatch.setattr(module.Setting, "loop", lambda self: (loops.append(self), loop(self))[1])
    ours, theirs = cost.trainer_and_by_hand(setting, steps=5)
    assert list(ours) == list(theirs) == [1.0, 1.0]
    assert next(ticks) == 4 * 5  # two looks a step of each side
    (other,) = loops
    assert other is not setting and other.trained == setting.trained
    begun = fresh(setting)
    for one in (setting, other):  # both have trained, each its own student
        assert any(not torch.equal(v, w) for v, w in zip(one.method.student.state().values(), begun, strict=True))
    assert setting.method.student.module is not other.method.student.module


def fresh(setting: Any) -> list[torch.Tensor]:
    """The weights that a student of this setting starts with."""
    return list(type(setting)(setting.path, 2, setting.seed, setting.trained).method.student.state().values())


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


def labels(benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, only: list[str]) -> list[str]:
    """What `measure` yields, with settings and fits that do nothing."""
    cost = benchmarks["step_cost"]
    monkeypatch.setattr(cost, "Setting", lambda path, batch, seed, trained="LCM-LoRA": f"{path}, {trained}")
    for name in ("trainer_and_by_hand", "cached_and_encoded", "shared_and_copied"):
        monkeypatch.setattr(cost, name, lambda setting, steps: (seen.append(setting), ([1.0], [1.0]))[1])
    monkeypatch.setattr(cost, "weights", lambda setting: ([1], [1]))
    monkeypatch.setattr(cost, "peaks", lambda what, path, options: ([1], [1]))
    monkeypatch.setattr(cost, "held", lambda setting: 1)
    seen: list[str] = []
    options = parse(cost.Benchmark, ["--repeats", "1", *only]).recipe
    rows = list(cost.measure(options, {name: name for name in ("tiny", "demo", "wide")}))
    timed = [row.network for row in rows if "time" in row.quantity]
    assert [setting.removesuffix(", LCM-LoRA") for setting in seen] == timed
    return [row.network for row in rows]


def test_only_one_method_is_measured(benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = labels(benchmarks, monkeypatch, [])
    ladder = ["demo, progressive, k = 5, guided", "demo, progressive, k = 2"]
    assert labels(benchmarks, monkeypatch, ["--only", "progressive"]) == ladder
    game = ["demo, LADD, full", "demo, LADD, LoRA", *["demo, LADD"] * 2, *["wide, LADD"] * 2]
    assert labels(benchmarks, monkeypatch, ["--only", "ladd"]) == game
    assert labels(benchmarks, monkeypatch, ["--only", "lcm"]) == [row for row in everything if row not in ladder + game]
    assert len(everything) == 18


def test_rows_that_are_not_measured_anew_are_kept(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost, path = benchmarks["step_cost"], tmp_path / "step_cost.json"
    monkeypatch.setattr(cost, "save_pipeline", lambda folder, unet, seed: "")

    def run(ratio: float, only: str, *arguments: str) -> list[tuple[str, float]]:
        rows = [cost.Row("a / b", name, "CPU time", ratio, None, (1, 1), 3) for name in ("demo", "demo, progressive")]
        monkeypatch.setattr(cost, "measure", lambda options, _: (r for r in rows if options.measures(r.network)))
        cost.main(parse(cost.Benchmark, ["--output", str(path), *(["--only", only] if only else []), *arguments]))
        data = json.loads(path.read_text())
        assert "only" not in data["protocol"]
        return [(row["network"], row["ratio"]) for row in data["rows"]]

    with pytest.raises(InputError, match="expected a results file whose other rows to keep"):
        run(1.0, "lcm")
    assert run(1.0, "") == [("demo", 1.0), ("demo, progressive", 1.0)]
    assert run(2.0, "progressive") == [("demo", 1.0), ("demo, progressive", 2.0)]
    assert run(3.0, "lcm") == [("demo", 3.0), ("demo, progressive", 2.0)]
    assert run(9.0, "ladd") == [("demo", 3.0), ("demo, progressive", 2.0)]
    before = path.read_text()
    with pytest.raises(InputError, match="options and the machine"):
        run(4.0, "lcm", "--batch", "4")
    path.write_text(before.replace('"python": "', '"python": "2.'))
    with pytest.raises(InputError, match="options and the machine"):
        run(4.0, "lcm")
    assert run(5.0, "") == [("demo", 5.0), ("demo, progressive", 5.0)]


@pytest.mark.slow
def test_peaks_are_of_processes_of_their_own(benchmarks: dict[str, ModuleType], tiny: str) -> None:
    cost = benchmarks["step_cost"]
    ballast = torch.ones(2**28)  # 1 GiB that the new process must not be charged with
    (ours,), (theirs,) = cost.peaks(cost.BY_HAND, tiny, cost.Benchmark(steps=4, repeats=1, batch=2))
    assert ballast[0] == 1.0
    for value in (ours, theirs):
        assert 2**20 < value < 2**29


@pytest.mark.slow
def test_peaks_of_ladd_are_of_both_kinds_of_student(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost, setting = benchmarks["step_cost"], benchmarks["step_setting"]
    wide = setting.save_pipeline(tmp_path, setting.UNETS["wide"], seed=0)
    (lora,), (full,) = cost.peaks(cost.LORA, wide, cost.Benchmark(steps=4, repeats=1, batch=2))
    assert 2**20 < lora < 0.8 * full
