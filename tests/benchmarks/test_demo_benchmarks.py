"""The demo's benchmarks: the teacher's rows go on where they stopped, students are trained as the recipe trains them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recipe_runs import load_recipe, load_script
from tiny import tiny_pipeline

from stepdistill.bench import demo
from stepdistill.bench.environment import environment
from stepdistill.bench.rows import Cell, Quality, Results, Speed, Value
from stepdistill.bench.table import markdown
from stepdistill.config import parse
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "fd": Value(5.0, (4.0, 6.0)),
    "kid": Value(0.1),
    "accuracy": Value(1.0, (1.0, 1.0)),
    "accuracy/ground": Value(1.0),
}
ROW = Quality(Cell("teacher", 50, 2.0), 60, 100.0, VALUES)
REAL = {"fd": {"value": 1.0, "interval": [0.9, 1.1]}}
PROTOCOL: dict[str, Any] = {"features": {"name": "judge", "hash": "0"}, "real": {"60": REAL, "20": REAL}}


def row(steps: int, distance: float, model: str = "teacher", guidance: float = 2.0, n: int = 60) -> Quality:
    return Quality(
        Cell(model, steps, guidance), n, 100.0, {**VALUES, "fd": Value(distance, (distance - 1, distance + 1))}
    )


def script(name: str) -> ModuleType:
    module: ModuleType = load_script("benchmarks", name)
    return module


def write(path: Path, *rows: Quality) -> None:
    speed = [Speed(cell, 1, (0.5, 0.6), {}, 100.0) for cell in dict.fromkeys(row.cell for row in rows)]
    Results(list(rows), PROTOCOL, speed).write(path)


@pytest.mark.parametrize(("name", "settings"), [("lcm_lora", ""), ("progressive", "--train.max_train_steps 9")])
def test_a_students_command_is_one_that_the_recipe_takes(tmp_path: Path, name: str, settings: str) -> None:
    module = script("demo_students")
    options = module.Benchmark(recipe=name, settings=settings, threads=1)
    words = module.command(options, tmp_path / "7", 7)
    assert words[words.index("--num_cpu_threads_per_process") + 1] == "1"
    start = words.index(str(ROOT / "recipes" / f"{name}.py")) + 1
    defaults = ROOT / "recipes" / "configs" / f"{name}_demo.yaml"
    recipe = parse(load_recipe(name).Recipe, words[start:], defaults=defaults).recipe
    assert (recipe.train.max_train_steps == 9) == bool(settings)
    assert (recipe.train.seed, recipe.eval.images, recipe.output_dir) == (7, 5000, str(tmp_path / "7"))
    assert recipe.train.resume_from_checkpoint == "latest" and recipe.teacher.path == "demo"
    assert "--num_cpu_threads_per_process" not in module.command(module.Benchmark(), tmp_path, 0)


def test_students_stand_under_the_teachers_lowest_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("demo_students")
    rows = [ROW, row(50, 6.0, guidance=1.0), row(2, 40.0), row(2, 30.0, guidance=1.0)]
    for seed in (3, 4):
        write(tmp_path / "runs" / str(seed) / "results.json", *rows, row(2, 5.0 + seed, "student", 1.0))
    flags = ["--seeds", "3,4", "--images", "60", "--runs", str(tmp_path / "runs")]
    flags += ["--output", str(tmp_path / "out.json")]
    module.main(parse(module.Benchmark, flags))
    found = Results.read(tmp_path / "out.json")
    assert [(*vars(r.cell).values(), r.distance) for r in found.quality] == [
        ("teacher", 50, 2.0, 5.0), ("teacher", 2, 1.0, 30.0),
        ("student, seed 3", 2, 1.0, 8.0), ("student, seed 4", 2, 1.0, 9.0),
    ]  # fmt: skip
    assert [s.cell for s in found.speed] == [r.cell for r in found.quality]
    assert found.teacher == ROW.cell and found.environment == environment()
    assert found.gap_closed(found.quality[2]) == pytest.approx((30 - 8) / (30 - 5))
    assert markdown(found) in capsys.readouterr().out

    flags[3] = "61"
    with pytest.raises(InputError, match=r"teacher and student of 61 images in .*results.json"):
        module.main(parse(module.Benchmark, flags))
    flags[3] = "60"
    with pytest.raises(InputError, match="--seeds"):
        module.main(parse(module.Benchmark, [*flags, "--seeds="]))
    write(tmp_path / "runs" / "4" / "results.json", row(2, 9.0, "student", 1.0))
    with pytest.raises(InputError, match=r"after benchmarks/demo_teacher.py"):
        module.main(parse(module.Benchmark, flags))


def test_a_run_that_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("demo_students")
    made: list[list[str]] = []

    def train(words: list[str], **options: Any) -> None:
        made.append(words)
        assert options["check"]  # a run that fails must not pass for one
        write(tmp_path / "runs" / "0" / "results.json", ROW, row(2, 7.0, "student", 1.0))

    monkeypatch.setattr(module.subprocess, "run", train)
    flags = ["--seeds", "0", "--images", "60", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    for _ in range(2):  # the second time it is there
        module.main(parse(module.Benchmark, flags))
    assert made == [module.command(module.Benchmark(images=60), tmp_path / "runs" / "0", 0)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A teacher of random weights, few images of everything; captions as long as its tokenizer takes."""
    import torch

    from stepdistill.bench.judge import Judge
    from stepdistill.demo.world import ATTRIBUTES, TEST_SEED, World

    captions = World.captions
    monkeypatch.setattr(World, "captions", lambda world, indices: [c[:20] for c in captions(world, indices)])
    for name, value in (
        ("yardstick.RESAMPLES", 10), ("yardstick.DIVERSITY", (3, 2)),
        ("scores.read_labels", lambda texts: World(TEST_SEED).labels(range(len(texts)))),
    ):  # fmt: skip
        monkeypatch.setattr(f"stepdistill.bench.{name}", value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge({name: len(values) for name, values in ATTRIBUTES.items()}, resolution=32, width=4, dense=8)
    judge.save(tmp_path / "judge")
    flags = {"teacher": tiny_pipeline(tmp_path / "sd"), "judge": tmp_path / "judge", "n": "6,12", "real": 30}
    flags |= {"reference": tmp_path / "reference.safetensors", "output": tmp_path / "teacher.json"}
    flags |= {"samples": tmp_path / "samples"}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_the_teachers_rows_go_on_where_they_stopped(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("demo_teacher")
    measured: list[tuple[int, float]] = []
    original = demo.evaluate

    def spy(entries: list[Any], stick: Any, folder: Any) -> list[Quality]:
        measured.extend((*entry.steps, entry.guidance) for entry in entries)
        return original(entries, stick, folder)

    monkeypatch.setattr(demo, "evaluate", spy)
    module.main(parse(module.Benchmark, [*small, "--steps", "2", "--guidance", "2"]))
    assert (tmp_path / "reference.safetensors").is_file()
    first = Results.read(tmp_path / "teacher.json")
    module.main(parse(module.Benchmark, [*small, "--steps", "1", "--guidance", "2"]))  # what isn't asked for stays
    module.main(parse(module.Benchmark, [*small, "--steps", "2,1", "--guidance", "2,1"]))
    assert measured == [(2, 2.0), (1, 2.0), (2, 1.0), (1, 1.0)]
    whole = Results.read(tmp_path / "teacher.json")
    assert [(r.n, r.cell.guidance, r.cell.steps) for r in whole.quality] == [
        (n, g, k) for n in (6, 12) for g in (1.0, 2.0) for k in (2, 1)
    ]  # fmt: skip
    assert all(row in whole.quality for row in first.quality) and len(first.quality) == 2
    assert [(s.cell.guidance, s.cell.steps, len(s.seconds)) for s in whole.speed] == [
        (1.0, 2, 5), (1.0, 1, 5), (2.0, 2, 5), (2.0, 1, 5),
    ]  # fmt: skip
    assert whole.teacher == whole.best(12).cell  # type: ignore[union-attr]

    data = json.loads((tmp_path / "teacher.json").read_text())
    data["protocol"]["seeds"]["noise"] = 9  # rows of another protocol are not taken over
    (tmp_path / "teacher.json").write_text(json.dumps(data))
    module.main(parse(module.Benchmark, [*small, "--steps", "1", "--guidance", "1"]))
    assert measured[4:] == [(1, 1.0)]
    assert len(Results.read(tmp_path / "teacher.json").quality) == 2
