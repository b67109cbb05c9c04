"""The demo's benchmarks: the teacher's rows go on where they stopped, students are trained as the recipe trains them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recipe_runs import load_recipe, load_script
from tiny import tiny_pipeline

from stepdistill.bench import demo, yardstick
from stepdistill.bench.table import Results, Row
from stepdistill.config import parse
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ROW = Row(
    "teacher", 50, 2.0, 5.0, (4.0, 6.0), 0.1, 0.9, 3.0, {"ground": 1.0, "all": 1.0}, (1.0, 1.0), (0.5,), 100.0, 60
)
REAL = {"frechet": 1.0, "interval": [0.9, 1.1], "recall": 1.0, "diversity": 3.0, "accuracy": {"all": 1.0}}
PROTOCOL: dict[str, Any] = {"features": {"name": "judge", "hash": "0"}, "real": {"60": REAL, "20": REAL}}


def script(name: str) -> ModuleType:
    module: ModuleType = load_script("benchmarks", name)
    return module


def write(path: Path, *rows: Row, **protocol: Any) -> None:
    Results(list(rows), {**PROTOCOL, **protocol}).write(path)


def student(steps: int, frechet: float, n: int = 60) -> Row:
    return replace(ROW, model="student", steps=steps, guidance=1.0, frechet=frechet, n=n)


def test_a_students_command_is_one_that_the_recipe_takes(tmp_path: Path) -> None:
    module = script("demo_lcm_lora")
    words = module.command(tmp_path / "7", 7, 5000, threads=1)
    assert words[words.index("--num_cpu_threads_per_process") + 1] == "1"
    start = words.index(str(ROOT / "recipes" / "lcm_lora.py")) + 1
    recipe = parse(
        load_recipe().Recipe, words[start:], defaults=ROOT / "recipes" / "configs" / "lcm_lora_demo.yaml"
    ).recipe
    assert (recipe.train.seed, recipe.eval.images, recipe.output_dir) == (7, 5000, str(tmp_path / "7"))
    assert recipe.train.resume_from_checkpoint == "latest" and recipe.teacher.path == "demo"
    assert "--num_cpu_threads_per_process" not in module.command(tmp_path, 0, 10, threads=0)


def test_students_stand_under_the_teachers_lowest_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("demo_lcm_lora")
    rows = [ROW, replace(ROW, guidance=1.0, frechet=6.0), replace(ROW, steps=2, frechet=40.0)]
    rows += [replace(ROW, steps=2, guidance=1.0, frechet=30.0)]
    for seed in (3, 4):
        timed = [replace(row, seconds=(0.1 * seed,)) for row in rows]
        write(tmp_path / "runs" / str(seed) / "results.json", *timed, student(2, 5.0 + seed))
    flags = ["--seeds", "3,4", "--images", "60", "--runs", str(tmp_path / "runs")]
    flags += ["--output", str(tmp_path / "out.json")]
    module.main(parse(module.Benchmark, flags))
    found = Results.read(tmp_path / "out.json")
    assert [(r.model, r.steps, r.guidance, r.frechet) for r in found.rows] == [
        ("teacher", 50, 2.0, 5.0), ("teacher", 2, 1.0, 30.0),
        ("student, seed 3", 2, 1.0, 8.0), ("student, seed 4", 2, 1.0, 9.0),
    ]  # fmt: skip
    assert found.rows[0].seconds == (0.4,)  # of the last student's turns
    assert found.gap_closed(found.rows[2]) == pytest.approx((30 - 8) / (30 - 5))
    assert found.markdown() in capsys.readouterr().out

    flags[3] = "61"
    with pytest.raises(InputError, match=r"teacher and student of 61 images in .*results.json"):
        module.main(parse(module.Benchmark, flags))
    flags[3] = "60"
    with pytest.raises(InputError, match="--seeds"):
        module.main(parse(module.Benchmark, [*flags, "--seeds="]))
    write(tmp_path / "runs" / "4" / "results.json", student(2, 9.0))
    with pytest.raises(InputError, match=r"after benchmarks/demo_teacher.py"):
        module.main(parse(module.Benchmark, flags))


def test_a_run_that_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("demo_lcm_lora")
    made: list[list[str]] = []

    def train(words: list[str], **options: Any) -> None:
        made.append(words)
        assert options["check"]  # a run that fails must not pass for one
        write(tmp_path / "runs" / "0" / "results.json", ROW, student(2, 7.0))

    monkeypatch.setattr(module.subprocess, "run", train)
    flags = ["--seeds", "0", "--images", "60", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out.json")]
    for _ in range(2):  # the second time it is there
        module.main(parse(module.Benchmark, flags))
    assert made == [module.command(tmp_path / "runs" / "0", 0, 60, 0)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A teacher of random weights, few images of everything; captions as long as its tokenizer takes."""
    import torch

    from stepdistill.bench.judge import Judge
    from stepdistill.demo.world import ATTRIBUTES, World

    captions = World.captions
    monkeypatch.setattr(World, "captions", lambda world, indices: [c[:20] for c in captions(world, indices)])
    for module, name, value in (
        (yardstick, "RESAMPLES", 10), (yardstick, "PROMPTS", 3), (yardstick, "IMAGES", 2), (demo, "REPEATS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge({name: len(values) for name, values in ATTRIBUTES.items()}, resolution=32, width=4, dense=8)
    judge.save(tmp_path / "judge")
    flags = {"teacher": tiny_pipeline(tmp_path / "sd"), "judge": tmp_path / "judge", "n": "6,12", "real": 30}
    flags |= {"reference": tmp_path / "reference.safetensors", "output": tmp_path / "teacher.json"}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_the_teachers_rows_go_on_where_they_stopped(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("demo_teacher")
    measured: list[tuple[int, float]] = []
    original = demo.evaluate

    def spy(pipe: Any, stick: Any, model: str, steps: Any, guidance: float, *rest: Any) -> list[Row]:
        measured.append((*steps, guidance))
        return original(pipe, stick, model, steps, guidance, *rest)

    monkeypatch.setattr(demo, "evaluate", spy)
    module.main(parse(module.Benchmark, [*small, "--steps", "2", "--guidance", "2"]))
    assert (tmp_path / "reference.safetensors").is_file()
    first = Results.read(tmp_path / "teacher.json")
    module.main(parse(module.Benchmark, [*small, "--steps", "1", "--guidance", "2"]))  # what isn't asked for stays
    module.main(parse(module.Benchmark, [*small, "--steps", "2,1", "--guidance", "2,1"]))
    assert measured == [(2, 2.0), (1, 2.0), (2, 1.0), (1, 1.0)]
    whole = Results.read(tmp_path / "teacher.json")
    assert [(r.n, r.guidance, r.steps) for r in whole.rows] == [
        (n, g, k) for n in (6, 12) for g in (1.0, 2.0) for k in (2, 1)
    ]  # fmt: skip
    for row in first.rows:
        assert replace(row, seconds=()) in [replace(r, seconds=()) for r in whole.rows]
    assert all(len(row.seconds) == 1 for row in whole.rows)

    data = json.loads((tmp_path / "teacher.json").read_text())
    data["protocol"]["seeds"]["noise"] = 9  # rows of another protocol are not taken over
    (tmp_path / "teacher.json").write_text(json.dumps(data))
    module.main(parse(module.Benchmark, [*small, "--steps", "1", "--guidance", "1"]))
    assert measured[4:] == [(1, 1.0)]
    assert len(Results.read(tmp_path / "teacher.json").rows) == 2
