"""The demo's measurement from end to end, on a pipeline and a judge of random weights at 32 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.bench import demo, yardstick
from stepdistill.bench.demo import compare_with_teacher, evaluate, shipped, side_by_side, timed
from stepdistill.bench.features import JudgeFeatures, to_images
from stepdistill.bench.generate import generate
from stepdistill.bench.judge import Judge
from stepdistill.bench.reference import Reference
from stepdistill.bench.table import Results, Row
from stepdistill.bench.yardstick import Yardstick
from stepdistill.demo.world import ATTRIBUTES, REFERENCE_SEED, TEST_SEED, World
from stepdistill.errors import InputError

COUNT = 12
pytestmark = pytest.mark.filterwarnings("ignore:Frechet distance of")  # far fewer images than a real run has


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few of everything, and captions for the tiny tokenizer, which has one token a letter and room for 22 letters."""
    captions = World.captions
    with monkeypatch.context() as patch:
        patch.setattr(yardstick, "RESAMPLES", 20)
        patch.setattr(yardstick, "PROMPTS", 3)
        patch.setattr(yardstick, "IMAGES", 2)
        patch.setattr(demo, "REPEATS", 2)
        patch.setattr(World, "captions", lambda world, indices: [c[:20] for c in captions(world, indices)])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Judge({name: len(values) for name, values in ATTRIBUTES.items()}, resolution=32, width=4, dense=8).eval()


@pytest.fixture(scope="module")
def reference(judge: Judge) -> Reference:
    return Reference.measure(JudgeFeatures(judge), 32, count=40, kept=30)


def pipeline(folder: Path, scheduler: str = "DDIMScheduler") -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_reference_is_what_its_images_say(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepdistill.bench.reference._PART", 7)  # parts that do not divide the whole
    features = JudgeFeatures(judge)
    found = Reference.measure(features, 32, count=40, kept=30)
    every = features(to_images(World(REFERENCE_SEED, 32).pixels(range(40)))).numpy()
    np.testing.assert_allclose(found.mean, every.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.cov, np.cov(every, rowvar=False), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.features, every[:30], rtol=1e-5, atol=1e-7)
    assert found.count == 40 and found.mean.dtype == found.cov.dtype == torch.float64


def test_reference_reads_back(judge: Judge, reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.safetensors"
    reference.save(path)
    back = Reference.load(path, JudgeFeatures(judge))
    for name in ("mean", "cov", "features"):
        assert torch.equal(vars(back)[name], vars(reference)[name])
    assert (back.count, back.weights_hash) == (40, JudgeFeatures(judge).weights_hash)


def test_reference_of_another_judge_or_none_at_all(judge: Judge, reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(InputError, match="got nothing at"):
        Reference.load(path, JudgeFeatures(judge))
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="expected reference statistics, got"):
        Reference.load(path, JudgeFeatures(judge))
    replace(reference, weights_hash="0").save(path)
    with pytest.raises(InputError, match="expected reference statistics of judge"):
        Reference.load(path, JudgeFeatures(judge))


def test_real_images_stand_at_the_floor_and_the_ceiling(judge: Judge, reference: Reference) -> None:
    """Given as a model's, the real images of the prompts score what the protocol says of real images."""
    stick = Yardstick(judge, (8, COUNT), reference=reference)
    test = World(TEST_SEED, 32)
    rows = stick.rows("m", 1, 1.0, to_images(test.pixels(range(COUNT))), to_images(test.variants(range(3), 2)), 0)
    assert [row.n for row in rows] == [8, COUNT]
    for row in rows:
        real = stick.protocol()["real"][str(row.n)]
        assert row.frechet == real["frechet"] > 0
        assert (
            row.accuracy == real["accuracy"] and row.recall == real["recall"] and row.diversity == real["diversity"] > 0
        )
        assert row.interval[0] <= row.frechet <= row.interval[1]
        assert row.accuracy_interval[0] <= row.accuracy["all"] <= row.accuracy_interval[1]
    assert rows[0].frechet != rows[1].frechet and rows[0].kid != rows[1].kid


def test_smaller_sizes_are_the_first_of_the_largest(judge: Judge, reference: Reference) -> None:
    both, few = Yardstick(judge, (8, COUNT), reference=reference), Yardstick(judge, (8,), reference=reference)
    images, varied = noise(COUNT), noise(6, seed=1)
    assert both.rows("m", 4, 2.0, images, varied, 8)[0] == few.rows("m", 4, 2.0, images[:8], varied, 8)[0]


def test_diversity_is_within_a_caption(judge: Judge, reference: Reference) -> None:
    stick = Yardstick(judge, (COUNT,), reference=reference)
    assert len(stick.varied) == 6 and stick.varied[0] == stick.varied[1] == stick.prompts[0] != stick.varied[2]
    images, varied = noise(COUNT), noise(6, seed=1)
    (row,) = stick.rows("m", 4, 2.0, images, varied, 8)
    features = stick.features(varied)
    expected = torch.stack([(features[i] - features[i + 1]).norm() for i in (0, 2, 4)]).mean()
    assert row.diversity == pytest.approx(float(expected))
    (same,) = stick.rows("m", 4, 2.0, images, np.repeat(varied[::2], 2, axis=0), 8)
    assert same.diversity == 0.0


def test_reference_holds_none_of_the_images_that_the_prompts_came_from(judge: Judge, reference: Reference) -> None:
    real = JudgeFeatures(judge)(to_images(World(TEST_SEED, 32).pixels(range(COUNT))))
    assert float(torch.cdist(real, reference.features.double()).min()) > 1e-4


def test_labels_belong_to_the_prompts(judge: Judge, reference: Reference) -> None:
    stick = Yardstick(judge, (COUNT,), reference=reference)
    wanted = World(TEST_SEED).labels(range(COUNT))
    assert list(stick.labels(COUNT)) == list(ATTRIBUTES)
    for i, name in enumerate(ATTRIBUTES):
        assert torch.equal(stick.labels(COUNT)[name], wanted[:, i])
        assert torch.equal(stick.labels(5)[name], wanted[:5, i])
    assert stick.prompts == World(TEST_SEED).captions(range(COUNT))


def test_from_end_to_end(folder: Path, judge: Judge, reference: Reference, tmp_path: Path) -> None:
    said: list[str] = []
    teacher, student = pipeline(folder), pipeline(folder, "LCMScheduler")
    stick = Yardstick(judge, (COUNT,), reference=reference)
    rows = evaluate(teacher, stick, "teacher", (4, 1), 3.0, said.append)
    assert [row.evaluations for row in rows] == [8, 2]  # guidance doubles them
    Results(rows, stick.protocol()).write(tmp_path / "teacher.json")

    results = compare_with_teacher(
        tmp_path / "run", student, teacher, stick, tmp_path / "teacher.json", (4, 1), say=said.append
    )
    assert [(row.model, row.steps, row.evaluations) for row in results.rows] == [
        ("teacher", 4, 8), ("teacher", 1, 2), ("student", 4, 4), ("student", 1, 1),
    ]  # fmt: skip
    for before, after in zip(rows, results.rows, strict=False):
        assert before == replace(after, seconds=())  # quality is shipped, seconds are taken here
    assert all(len(row.seconds) == 2 for row in results.rows)
    assert Results.read(tmp_path / "run" / "results.json") == results
    assert (tmp_path / "run" / "table.md").read_text() == results.markdown()
    assert results.markdown() in said[-1]
    with Image.open(tmp_path / "run" / "grid.png") as image:
        assert image.width > 4 * 128 and image.height > 8 * 128
    again = evaluate(student, stick, "student", (4, 1), 1.0, said.append)
    assert again == [replace(row, seconds=()) for row in results.rows[2:]]


def test_the_images_of_a_row_have_their_own_noise(
    folder: Path, judge: Judge, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], int]] = []

    def spy(pipe: Any, prompts: list[str], **options: Any) -> np.ndarray:
        calls.append((list(prompts), options.get("start_index", 0)))
        return generate(pipe, prompts, **options)

    monkeypatch.setattr(demo, "generate", spy)
    stick = Yardstick(judge, (COUNT,), reference=reference)
    evaluate(pipeline(folder), stick, "teacher", (1,), 1.0, lambda line: None)
    assert calls == [(stick.prompts, 0), (stick.varied, yardstick.APART)]
    assert yardstick.APART > 100_000  # no number of images gets there


def test_a_configuration_is_timed_once(folder: Path, judge: Judge, reference: Reference) -> None:
    stick = Yardstick(judge, (8, COUNT), reference=reference)
    pipe = pipeline(folder)
    rows = evaluate(pipe, stick, "teacher", (2, 1), 1.0, lambda line: None)
    assert [(row.steps, row.n) for row in rows] == [(2, 8), (2, COUNT), (1, 8), (1, COUNT)]
    done = timed(rows, {"teacher": pipe}, "a", repeats=3)
    assert done[0].seconds == done[1].seconds != done[2].seconds and len(done[0].seconds) == 3


@pytest.mark.parametrize(
    ("change", "rows", "note"),
    [
        (lambda p: p["features"].update(hash="0"), 0, "another protocol (features)"),
        (lambda p: p["seeds"].update(noise=5), 0, "another protocol (seeds)"),
        (lambda p: p.update(reference="others"), 0, "another protocol (reference)"),
        (lambda p: p.update(sizes=[99]), 1, None),
    ],
)
def test_other_protocols_are_not_mixed_in(
    judge: Judge, reference: Reference, tmp_path: Path, change: Any, rows: int, note: str | None
) -> None:
    stick = Yardstick(judge, (COUNT,), reference=reference)
    protocol = stick.protocol()
    change(protocol)
    Results(stick.rows("teacher", 4, 3.0, noise(COUNT), noise(6), 8), protocol).write(tmp_path / "teacher.json")
    found, notes = shipped(tmp_path / "teacher.json", stick)
    assert len(found) == rows
    assert (note in notes[0]) if note else not notes


def test_only_rows_of_as_many_images_are_taken(judge: Judge, reference: Reference, tmp_path: Path) -> None:
    both = Yardstick(judge, (8, COUNT), reference=reference)
    Results(both.rows("teacher", 4, 3.0, noise(COUNT), noise(6), 8), both.protocol()).write(tmp_path / "teacher.json")
    found, notes = shipped(tmp_path / "teacher.json", Yardstick(judge, (8,), reference=reference))
    assert [row.n for row in found] == [8] and not notes
    found, notes = shipped(tmp_path / "teacher.json", Yardstick(judge, (9,), reference=reference))
    assert not found and "No rows of the teacher at N = 9: those shipped are at 8, 12" in notes[0]


def test_a_missing_file_is_a_note(judge: Judge, reference: Reference, tmp_path: Path) -> None:
    found, notes = shipped(tmp_path / "none.json", Yardstick(judge, (COUNT,), reference=reference))
    assert not found and "got nothing at" in notes[0]


def test_the_grid_shows_the_teacher_at_its_best_beside_the_student(judge: Judge, reference: Reference) -> None:
    (row,) = Yardstick(judge, (COUNT,), reference=reference).rows("teacher", 50, 1.0, noise(COUNT), noise(6), 50)

    def made(model: str, steps: int, guidance: float, frechet: float) -> Row:
        return replace(row, model=model, steps=steps, guidance=guidance, frechet=frechet)

    rows = [
        made("teacher", 50, 2.0, 1.0), made("teacher", 50, 1.0, 2.0), made("teacher", 8, 2.0, 1.1),
        made("teacher", 4, 2.0, 9.0), made("teacher", 4, 1.0, 5.0), made("student", 4, 1.0, 2.0), made("student", 2, 1.0, 2.0),
    ]  # fmt: skip
    shown = side_by_side(Results(rows, {"real": {}}))
    assert shown == [rows[0], rows[4], rows[5], rows[6]]


def test_one_denoiser_cannot_be_both(folder: Path, judge: Judge, reference: Reference, tmp_path: Path) -> None:
    pipe, stick = pipeline(folder), Yardstick(judge, (COUNT,), reference=reference)
    with pytest.raises(ValueError, match="denoisers of their own"):
        compare_with_teacher(tmp_path, pipe, pipe, stick, tmp_path / "none.json")


def test_too_few_images_or_steps(folder: Path, judge: Judge, reference: Reference) -> None:
    for sizes in ((1,), (), (COUNT, 0)):
        with pytest.raises(InputError, match="at least 2 images"):
            Yardstick(judge, sizes, reference=reference)
    with pytest.raises(InputError, match="one number of steps or more"):
        evaluate(pipeline(folder), Yardstick(judge, (COUNT,), reference=reference), "teacher", (), 1.0)
