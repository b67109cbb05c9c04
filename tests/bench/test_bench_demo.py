"""The demo's measurement from end to end, on a pipeline and a judge of random weights at 32 pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.bench import demo
from stepdistill.bench.demo import Yardstick, compare_with_teacher, evaluate_student, evaluate_teacher
from stepdistill.bench.features import to_images
from stepdistill.bench.judge import Judge
from stepdistill.bench.table import Results
from stepdistill.demo.world import ATTRIBUTES, PHRASES, TEST_SEED, World
from stepdistill.errors import InputError

COUNT = 12
pytestmark = pytest.mark.filterwarnings("ignore:Frechet distance of")  # far fewer images than a real run has


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "REFERENCE_N", 40)
    monkeypatch.setattr(demo, "RESAMPLES", 20)
    monkeypatch.setattr(demo, "REPEATS", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def short_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer has one token a letter and room for 22 letters."""
    captions = World.captions
    monkeypatch.setattr(World, "captions", lambda world, indices: [c[:20] for c in captions(world, indices)])


@pytest.fixture
def judge() -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Judge({name: len(values) for name, values in ATTRIBUTES.items()}, resolution=32, width=4, dim=8).eval()


def pipeline(folder: Path, scheduler: str = "DDIMScheduler") -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def test_real_images_stand_at_the_floor_and_the_ceiling(judge: Judge) -> None:
    yardstick = Yardstick(judge, COUNT)
    real = to_images(World(TEST_SEED, 32).pixels(range(COUNT)))
    row = yardstick.row("real", 1, 1.0, real, evaluations=0)
    assert row.frechet == yardstick.floor > 0
    assert row.accuracy == yardstick.ceiling
    assert row.interval[0] <= row.frechet <= row.interval[1]
    assert row.accuracy_interval[0] <= row.accuracy["all"] <= row.accuracy_interval[1]


def test_reference_holds_none_of_the_images_that_the_prompts_came_from(judge: Judge) -> None:
    yardstick = Yardstick(judge, COUNT)
    real = yardstick.features(to_images(World(TEST_SEED, 32).pixels(range(COUNT))))
    assert float(torch.cdist(real, yardstick.reference).min()) > 1e-3


def test_labels_belong_to_the_prompts(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(demo, "REFERENCE_N", 2)
    yardstick = Yardstick(judge, COUNT)
    for i, prompt in enumerate(yardstick.prompts):
        for name, column in yardstick.labels.items():
            value = ATTRIBUTES[name][column[i]]
            assert any(phrase in prompt for phrase in PHRASES[name][value])


def test_from_end_to_end(folder: Path, judge: Judge, tmp_path: Path) -> None:
    said: list[str] = []
    teacher, student = pipeline(folder), pipeline(folder, "LCMScheduler")
    shipped = evaluate_teacher(teacher, judge, (4, 1), n=COUNT, say=said.append)
    assert [row.evaluations for row in shipped.rows] == [8, 2]  # guidance doubles them
    shipped.write(tmp_path / "teacher.json")

    results = compare_with_teacher(
        tmp_path / "run", student, teacher, judge, tmp_path / "teacher.json", (4, 1), n=COUNT, say=said.append
    )
    assert [(row.model, row.steps, row.evaluations) for row in results.rows] == [
        ("teacher", 4, 8), ("teacher", 1, 2), ("student", 4, 4), ("student", 1, 1),
    ]  # fmt: skip
    for before, after in zip(shipped.rows, results.rows, strict=False):
        assert replace(before, seconds=()) == replace(after, seconds=())  # quality is shipped, seconds are taken anew
        assert before.seconds != after.seconds
    assert all(len(row.seconds) == 2 for row in results.rows)
    assert Results.read(tmp_path / "run" / "results.json") == results
    assert (tmp_path / "run" / "table.md").read_text() == results.markdown()
    assert results.markdown() in said[-1]
    with Image.open(tmp_path / "run" / "grid.png") as image:
        assert image.width > 4 * 128 and image.height > 8 * 128
    again = evaluate_student(student, judge, (4, 1), n=COUNT, say=said.append)
    assert [replace(row, seconds=()) for row in again] == [replace(row, seconds=()) for row in results.rows[2:]]


@pytest.mark.parametrize(
    ("change", "rows", "note"),
    [
        (lambda p: p["features"].update(hash="0"), 0, r"another protocol \(features\)"),
        (lambda p: p["seeds"].update(noise=5), 0, r"another protocol \(seeds\)"),
        (lambda p: p.update(n=99), 1, "don't compare with N = 12"),
        (lambda p: None, 1, None),
    ],
)
def test_other_protocols_are_not_mixed_in(
    judge: Judge, tmp_path: Path, change: Any, rows: int, note: str | None
) -> None:
    yardstick = Yardstick(judge, COUNT)
    image = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    protocol = yardstick.protocol()
    change(protocol)
    Results([yardstick.row("teacher", 4, 3.0, image, 8)], protocol).write(tmp_path / "teacher.json")
    results, notes = demo.shipped(tmp_path / "teacher.json", yardstick)
    assert len(results.rows if results else []) == rows
    assert bool(notes) == bool(note)
    if note:
        with pytest.raises(AssertionError, match=note):
            raise AssertionError(notes[0])


def test_a_missing_file_is_a_note(judge: Judge, tmp_path: Path) -> None:
    results, notes = demo.shipped(tmp_path / "none.json", Yardstick(judge, COUNT))
    assert results is None and "got nothing at" in notes[0]


def test_one_denoiser_cannot_be_both(folder: Path, judge: Judge, tmp_path: Path) -> None:
    pipe = pipeline(folder)
    with pytest.raises(ValueError, match="denoisers of their own"):
        compare_with_teacher(tmp_path, pipe, pipe, judge, tmp_path / "none.json", n=COUNT)


def test_too_few_images(judge: Judge) -> None:
    with pytest.raises(InputError, match="at least 2 images"):
        Yardstick(judge, 1)
