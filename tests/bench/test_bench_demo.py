"""The demo's measurement from end to end, on a pipeline and a judge of random weights at 32 pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.bench import demo, plan, yardstick
from stepdistill.bench.contenders import Contender, open_contenders
from stepdistill.bench.demo import STUDENT, Entry, compare_with_teacher, evaluate, shipped, side_by_side
from stepdistill.bench.features import JudgeFeatures, to_images
from stepdistill.bench.generate import generate
from stepdistill.bench.judge import Judge
from stepdistill.bench.plan import APART
from stepdistill.bench.real import WorldImages
from stepdistill.bench.reference import Reference
from stepdistill.bench.rows import TEACHER, Cell, Quality, Results, Value
from stepdistill.bench.samples import Samples
from stepdistill.bench.table import markdown
from stepdistill.bench.yardstick import Yardstick, demo_yardstick
from stepdistill.demo.world import ATTRIBUTES, TEST_SEED, World
from stepdistill.errors import InputError

COUNT = 12
pytestmark = pytest.mark.filterwarnings("ignore:Frechet distance of")  # far fewer images than a real run has


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of everything, and short captions, all there is room for in the tiny tokenizer, which no judge is to read."""
    captions = World.captions
    monkeypatch.setattr("stepdistill.bench.yardstick.RESAMPLES", 20)
    monkeypatch.setattr("stepdistill.bench.yardstick.DIVERSITY", (3, 2))
    monkeypatch.setattr(demo, "REPEATS", 2)
    monkeypatch.setattr(
        "stepdistill.bench.scores.read_labels", lambda texts: World(TEST_SEED).labels(range(len(texts)))
    )
    monkeypatch.setattr(World, "captions", lambda world, indices: [c[:20] for c in captions(world, indices)])


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
    return Reference.measure(JudgeFeatures(judge), WorldImages(40), 32, kept=30)


@pytest.fixture
def stick(judge: Judge, reference: Reference) -> Yardstick:
    return demo_yardstick(judge, (COUNT,), reference=reference)


def contender(folder: Path, scheduler: str = "DDIMScheduler", name: str = TEACHER) -> Contender:
    import diffusers

    (found,) = open_contenders(str(folder), [])
    found.pipe.scheduler = getattr(diffusers, scheduler).from_config(found.pipe.scheduler.config)
    found.name = name
    return found


def noise(stick: Yardstick, seed: int = 0) -> Samples:
    """Of random numbers for features."""
    draws = torch.Generator().manual_seed(seed)
    features, spread = (torch.randn(n, stick.features.dim, generator=draws) for n in (COUNT, 6))
    hits = {key: torch.randint(2, (COUNT,), generator=draws).double() for key in ("accuracy", "accuracy/ground")}
    return Samples(features, spread.reshape(3, 2, -1), hits, None, 8.0)


def row_of(stick: Yardstick, model: str, steps: int, guidance: float, distance: float = 5.0) -> Quality:
    (row,) = stick.rows(Cell(model, steps, guidance), noise(stick))
    return replace(row, values={**row.values, "fd": Value(distance, (distance - 1, distance + 1))})


def test_real_images_stand_at_the_floor_and_the_ceiling(judge: Judge, reference: Reference) -> None:
    """Given as a model's, the real images of the prompts score what the protocol says of real images."""
    stick = demo_yardstick(judge, (8, COUNT), reference=reference)
    test = World(TEST_SEED, 32)
    features = JudgeFeatures(judge)
    spread = features(to_images(test.variants(range(3), 2))).float().reshape(3, 2, -1)
    real = to_images(test.pixels(range(COUNT)))
    scores = stick.scorers["accuracy"](stick.plan.prompts, real)
    hits = {"accuracy" + ("" if name == "all" else f"/{name}"): values for name, values in scores.items()}
    rows = stick.rows(Cell("m", 1, 1.0), Samples(features(real).float(), spread, hits, None, 0.0))
    assert [row.n for row in rows] == [8, COUNT]
    for row in rows:
        found = stick.protocol()["real"][str(row.n)]
        assert {key: Value.read(value) for key, value in found.items()} == row.values
        assert len(row.values) == 5 + len(ATTRIBUTES) and row.values["fd"].value > 0
        for key in ("fd", "accuracy"):
            low, high = row.values[key].interval or (1.0, 0.0)
            assert low <= row.values[key].value <= high
    assert rows[0].values["fd"] != rows[1].values["fd"] and rows[0].values["kid"] != rows[1].values["kid"]


def test_real_images_are_drawn_in_parts(
    judge: Judge, reference: Reference, stick: Yardstick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have their own captions, and together are all."""
    monkeypatch.setattr(yardstick, "_PART", 5)
    asked: list[str] = []
    monkeypatch.setattr(
        "stepdistill.bench.scores.read_labels",
        lambda texts: asked.extend(texts) or World(TEST_SEED).labels(range(len(asked) - len(texts), len(asked))),
    )
    (found,), (whole,) = (s.real.values() for s in (demo_yardstick(judge, (COUNT,), reference=reference), stick))
    assert {key: value["value"] for key, value in found.items()} == pytest.approx(
        {key: value["value"] for key, value in whole.items()}, rel=1e-5
    )
    assert tuple(asked) == stick.plan.prompts


def test_the_plan_is_the_test_worlds(stick: Yardstick) -> None:
    assert list(stick.plan.prompts) == World(TEST_SEED).captions(range(COUNT))
    assert stick.plan.spread == (3, 2)
    varied = stick.plan.varied
    assert len(varied) == 6 and varied[0] == varied[1] == stick.plan.prompts[0] != varied[2]
    assert stick.plan.batches()[-1].start == APART > 100_000  # no number of images gets there
    assert plan.DIVERSITY == (40, 8) and yardstick.N == 1200


def test_from_end_to_end(folder: Path, stick: Yardstick, tmp_path: Path) -> None:
    said: list[str] = []
    teacher, student = contender(folder), contender(folder, "LCMScheduler", STUDENT)
    rows = evaluate([Entry(teacher, (4, 1), 3.0)], stick, tmp_path / "sweep", said.append)
    assert [row.evaluations for row in rows] == [8, 2]  # guidance doubles them
    Results(rows, stick.protocol()).write(tmp_path / "teacher.json")

    run = tmp_path / "run"
    results = compare_with_teacher(
        run, [Entry(student, (4, 1))], teacher, stick, tmp_path / "teacher.json", said.append
    )
    assert [(row.cell.model, row.cell.steps, row.evaluations) for row in results.quality] == [
        ("teacher", 4, 8), ("teacher", 1, 2), ("student", 4, 4), ("student", 1, 1),
    ]  # fmt: skip
    assert results.quality[:2] == rows  # quality is shipped, seconds are taken here
    assert [(s.cell, s.batch_size, len(s.seconds)) for s in results.speed] == [(r.cell, 1, 2) for r in results.quality]
    assert results.teacher == results.best(COUNT).cell  # type: ignore[union-attr]
    assert Results.read(run / "results.json") == results
    assert (run / "table.md").read_text() == markdown(results)
    assert markdown(results) in said[-1]
    with Image.open(run / "grid.png") as image:
        assert image.width > 4 * 128 and image.height > 8 * 128
    again = evaluate([Entry(student, (4, 1), 1.0)], stick, tmp_path / "again", said.append)
    assert again == results.quality[2:]


def test_a_stopped_measurement_goes_on_and_another_student_is_measured_anew(
    folder: Path, stick: Yardstick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, made = contender(folder, "LCMScheduler", STUDENT), list[int]()
    original = Contender.images

    def images(self: Contender, cell: Cell, prompts: Any, *rest: Any) -> Any:
        made.append(len(prompts))
        return original(self, cell, prompts, *rest)

    monkeypatch.setattr(Contender, "images", images)
    first = evaluate([Entry(student, (2,), 1.0)], stick, tmp_path, lambda line: None)
    assert made == [COUNT, 6]
    assert evaluate([Entry(student, (2,), 1.0)], stick, tmp_path, lambda line: None) == first and made == [COUNT, 6]
    student.weights = "another"
    evaluate([Entry(student, (2,), 1.0)], stick, tmp_path, lambda line: None)
    assert made == [COUNT, 6] * 2


def test_the_images_of_a_row_have_their_own_noise(folder: Path, stick: Yardstick, tmp_path: Path) -> None:
    teacher = contender(folder)
    (row,) = evaluate([Entry(teacher, (1,), 1.0)], stick, tmp_path, lambda line: None)
    images = generate(teacher.pipe, stick.plan.prompts, steps=1, guidance_scale=1.0, seed=0)
    varied = generate(teacher.pipe, stick.plan.varied, steps=1, guidance_scale=1.0, seed=0, start_index=APART)
    features = stick.features(varied)
    expected = torch.stack([(features[i] - features[i + 1]).norm() for i in (0, 2, 4)]).mean()
    assert row.values["diversity"].value == pytest.approx(float(expected), rel=1e-5)
    assert float(stick.scorers["accuracy"](stick.plan.prompts, images)["ground"].mean()) == pytest.approx(
        row.values["accuracy/ground"].value
    )


@pytest.mark.parametrize(
    ("change", "rows", "note"),
    [
        (lambda p: p["features"].update(hash="0"), 0, "another protocol (features)"),
        (lambda p: p["seeds"].update(noise=5), 0, "another protocol (seeds)"),
        (lambda p: p["reference"].update(count=5), 0, "another protocol (reference)"),
        (lambda p: p.update(diversity=[1, 2]), 0, "another protocol (diversity)"),
        (lambda p: p.update(sizes=[99]), 1, None),
    ],
)
def test_other_protocols_are_not_mixed_in(
    stick: Yardstick, tmp_path: Path, change: Any, rows: int, note: str | None
) -> None:
    protocol = stick.protocol()
    change(protocol)
    Results([row_of(stick, TEACHER, 4, 3.0)], protocol).write(tmp_path / "teacher.json")
    found, notes = shipped(tmp_path / "teacher.json", stick)
    assert len(found) == rows
    assert (note in notes[0]) if note else not notes


def test_only_rows_of_as_many_images_are_taken(judge: Judge, reference: Reference, tmp_path: Path) -> None:
    both = demo_yardstick(judge, (8, COUNT), reference=reference)
    Results(both.rows(Cell(TEACHER, 4, 3.0), noise(both)), both.protocol()).write(tmp_path / "teacher.json")
    found, notes = shipped(tmp_path / "teacher.json", demo_yardstick(judge, (8,), reference=reference))
    assert [row.n for row in found] == [8] and not notes
    found, notes = shipped(tmp_path / "teacher.json", demo_yardstick(judge, (9,), reference=reference))
    assert not found and "No rows of the teacher at N = 9: those shipped are at 8, 12" in notes[0]


def test_a_missing_file_is_a_note(stick: Yardstick, tmp_path: Path) -> None:
    found, notes = shipped(tmp_path / "none.json", stick)
    assert not found and "got nothing at" in notes[0]


def test_the_grid_shows_the_teacher_at_its_best_beside_the_student(stick: Yardstick) -> None:
    rows = [
        row_of(stick, *made)
        for made in (
            (TEACHER, 50, 2.0, 1.0), (TEACHER, 50, 1.0, 2.0), (TEACHER, 8, 2.0, 1.1), (TEACHER, 4, 2.0, 9.0),
            (TEACHER, 4, 1.0, 5.0), (STUDENT, 4, 1.0, 2.0), (STUDENT, 2, 1.0, 2.0),
        )
    ]  # fmt: skip
    assert side_by_side(Results(rows, {"real": {}})) == [rows[i].cell for i in (0, 4, 5, 6)]


def test_one_denoiser_cannot_be_both(folder: Path, stick: Yardstick, tmp_path: Path) -> None:
    teacher = contender(folder)
    with pytest.raises(ValueError, match="denoisers of their own"):
        compare_with_teacher(tmp_path, [Entry(teacher, (1,))], teacher, stick, tmp_path / "none.json")


def test_too_few_images_or_steps(
    folder: Path, judge: Judge, reference: Reference, stick: Yardstick, tmp_path: Path
) -> None:
    for sizes in ((1,), (), (COUNT, 0)):
        with pytest.raises(InputError, match="at least 2 images"):
            demo_yardstick(judge, sizes, reference=reference)
    with pytest.raises(InputError, match="one number of steps or more"):
        evaluate([Entry(contender(folder), (), 1.0)], stick, tmp_path)


def test_real_images_of_other_prompts_have_no_accuracy(judge: Judge, reference: Reference, stick: Yardstick) -> None:
    """The world has real images without end, but not of every prompt; of other data those held out are taken."""
    prompts = tuple(f"thing {i}" for i in range(COUNT))
    other = Yardstick(replace(stick.plan, prompts=prompts, source="a file"), stick.features, {}, stick.measure, (), 32)
    assert set(other.real[str(COUNT)]) == {"fd", "kid", "recall"}
    assert other.real[str(COUNT)]["fd"] == stick.real[str(COUNT)]["fd"]
    data = replace(reference, about={**reference.about, "source": "photos"}, held=reference.features[:COUNT])
    measure = type(stick.measure)(data, resamples=5)
    held = Yardstick(other.plan, stick.features, {}, measure, (COUNT, COUNT - 1), 32)
    assert set(held.real) == {str(COUNT), str(COUNT - 1)}
    measure = type(stick.measure)(replace(data, held=reference.features[: COUNT - 1]), resamples=5)
    assert set(Yardstick(other.plan, stick.features, {}, measure, (COUNT, COUNT - 1), 32).real) == {str(COUNT - 1)}
