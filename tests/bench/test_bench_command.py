"""`stepdistill bench` from flags to files: on the tiny pipeline with a vision model, and on the demo teacher that ships."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sweeping import COUNT, Corners, bench_words, demo_student, files_of
from tiny import tiny_images

from stepdistill import cli
from stepdistill.bench import command as module
from stepdistill.bench.contenders import Contender, open_contenders
from stepdistill.bench.metrics import frechet_distance
from stepdistill.bench.options import BenchOptions, add_arguments
from stepdistill.bench.plan import Plan
from stepdistill.bench.real import DataImages, WorldImages
from stepdistill.bench.reference import Reference
from stepdistill.bench.report import write_report
from stepdistill.bench.rows import Cell, Results, Speed, Value
from stepdistill.demo.world import World
from stepdistill.errors import InputError
from stepdistill.export.folder import FACTS, rung_folder

FEW = pytest.mark.filterwarnings("ignore:Frechet distance of")  # far fewer images than a real run has


@FEW
def test_from_flags_to_files(
    flags: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_report", write_report)
    monkeypatch.setattr(module, "open_contenders", open_contenders)
    out = tmp_path / "bench"
    cli.main(flags(out, "--repeats=1", "--batch_sizes=1,2", "--metrics=cmmd", "--save_images"))
    results = Results.read(out / "results.json")
    cells = [("teacher", 3, 3.0), ("teacher", 2, 3.0), ("teacher", 1, 3.0), ("lcm", 2, 1.0), ("lcm", 1, 1.0)]
    assert [tuple(vars(row.cell).values()) for row in results.quality] == cells
    assert [row.evaluations for row in results.quality] == [6, 4, 2, 2, 1]
    assert results.teacher == results.quality[0].cell and results.quality[0].against is None
    assert all(row.against is not None and row.against.interval is not None for row in results.quality[1:])
    assert [(s.cell.steps, s.batch_size) for s in results.speed] == [(k, b) for _, k, _ in cells for b in (1, 2)]
    own = {"fd", "kid", "recall", "diversity", "cmmd"}
    assert set(results.quality[0].values) == own
    assert set(results.quality[3].values) == {*own, "features_to_teacher", "rms_to_teacher"}
    assert set(results.samples) == {row.cell.slug for row in results.quality}
    assert {key: len(values) for key, values in results.samples["lcm-2-1"].items()} == {
        "features_to_teacher": COUNT, "rms_to_teacher": COUNT,
    }  # fmt: skip
    assert set(results.real(COUNT, "fd").__dict__) == {
        "value",
        "interval",
    }  # 30 photos: 12 held out, 18 to compare with
    assert not any("No floor" in note for note in results.notes)
    protocol = results.protocol
    assert protocol["prompts"]["count"] == COUNT and protocol["reference"]["count"] == 18
    assert protocol["features"] == {"name": "corners", "hash": "0c", "dim": 12}
    written = {path.name for path in out.iterdir()}
    assert written == {
        ".lock",
        "results.json",
        "results.csv",
        "results.md",
        "report.html",
        "grid.png",
        "reference.safetensors",
        "cells",
    }
    assert (out / "results.md").read_text() in capsys.readouterr().out
    assert len(list((out / "cells" / "lcm-2-1" / "images").iterdir())) == COUNT
    with Image.open(out / "grid.png") as image:
        assert image.width > 5 * 128


@FEW
def test_numbers_are_those_of_the_images(flags: Any, place: Path, tmp_path: Path) -> None:
    """From the PNG files and the photos, without anything of the sweep."""
    import numpy as np

    cli.main(flags(tmp_path, "--skip_latency", "--save_images"))
    results = Results.read(tmp_path / "results.json")
    assert not results.speed

    def features(slug: str) -> torch.Tensor:
        folder = tmp_path / "cells" / slug / "images"
        return Corners()(np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(COUNT)]))

    photos = DataImages(str(place / "photos"))
    order = photos.order()
    real = Corners()(np.stack([image for image in photos.read(order[:-COUNT], 32) if image is not None]))
    teacher, student = features("teacher-3-3"), features("lcm-1-1")
    row = results.quality[-1]
    assert row.cell == Cell("lcm", 1, 1.0)
    assert row.values["fd"].value == pytest.approx(frechet_distance(student, real), rel=1e-5)
    assert row.against is not None
    assert row.against.value == pytest.approx(
        frechet_distance(student, real) - frechet_distance(teacher, real), rel=1e-4
    )
    assert row.values["features_to_teacher"].value == pytest.approx(
        float((student - teacher).norm(dim=1).mean()), rel=1e-5
    )


@FEW
def test_a_sweep_goes_on_and_its_cells_are_kept(flags: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_contenders", open_contenders)  # anew for each sweep, and found to be the same
    cli.main(flags(tmp_path, "--skip_latency"))
    first, cells = Results.read(tmp_path / "results.json"), files_of(tmp_path / "cells")
    cli.main(flags(tmp_path, "--skip_latency"))
    again = Results.read(tmp_path / "results.json")
    assert again == first and files_of(tmp_path / "cells") == cells
    with pytest.raises(SystemExit) as stop:
        cli.main(flags(tmp_path, "--skip_latency", "--seed=1"))
    assert stop.value.code == 2 and files_of(tmp_path / "cells") == cells


@FEW
def test_images_that_are_kept_and_cells_that_are_made_again(
    flags: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 9)
    folder = tmp_path / "cells" / "lcm-2-1" / "images"
    cli.main(flags(tmp_path, "--skip_latency"))
    first = Results.read(tmp_path / "results.json")
    assert len(list(folder.iterdir())) == 9 and "RMS to teacher: of the first 9 images." in first.notes
    assert len(first.samples["lcm-2-1"]["rms_to_teacher"]) == 9
    cli.main(flags(tmp_path, "--skip_latency", "--save_images", "--seed=1", "--overwrite"))
    again = Results.read(tmp_path / "results.json")
    assert len(list(folder.iterdir())) == COUNT and not any("RMS" in note for note in again.notes)
    assert again.protocol["seeds"]["noise"] == 1 and again.quality[3].values["fd"] != first.quality[3].values["fd"]


@FEW
def test_a_model_that_draws_the_same_again(flags: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Contender.images

    def images(self: Contender, cell: Cell, prompts: Any, plan: Plan, start: int = 0) -> Any:
        found = original(self, cell, prompts, plan, start)
        if cell == Cell("lcm", 1, 1.0) and start == 0:  # of five
            found[3:] = found[1]
        return found

    monkeypatch.setattr(Contender, "images", images)
    cli.main(flags(tmp_path, "--skip_latency"))
    notes = Results.read(tmp_path / "results.json").notes
    assert [note for note in notes if "copies" in note] == [
        f"lcm, 1 step, guidance 1: 2 of {COUNT} images are copies of others."
    ]


def test_seconds_over_evaluations_are_of_single_images() -> None:
    rows = [
        Speed(Cell(model, steps, 1.0), size, (0.5 + 0.1 * steps * size,) * 2, {}, float(steps))
        for model in ("teacher", "lcm")
        for steps in (1, 2, 4)
        for size in (1, 8)
    ]
    found = module.fits(Results([], {}, rows))
    assert set(found) == {"teacher", "lcm"}
    for line in found.values():
        assert (line.fixed, line.per_evaluation) == pytest.approx((0.5, 0.1))
    assert module.fits(Results([], {}, [row for row in rows if row.batch_size == 8])) == {}


def test_the_cells_of_a_sweep(place: Path, tmp_path: Path) -> None:
    contenders = open_contenders(str(place / "sd"), [str(place / "lcm")])
    for more, expected in (
        ([], ["teacher-3-3", "teacher-2-3", "teacher-1-3", "lcm-2-1", "lcm-1-1"]),
        (["--steps=3,1", "--teacher_guidance=3,2"],  # 3 steps are the teacher's own, and are a cell once
         ["teacher-3-3", "teacher-1-3", "teacher-3-2", "teacher-1-2", "lcm-3-1", "lcm-1-1"]),
        (["--steps=2", "--guidance=1,1.5"], ["teacher-3-3", "teacher-2-3", "lcm-2-1", "lcm-2-1.5"]),
    ):  # fmt: skip
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        options = BenchOptions.read(vars(parser.parse_args(bench_words(place, tmp_path, *more)[1:])))
        jobs = module.cells(options, contenders)
        assert [cell.slug for cell, _ in jobs] == expected
        assert all(contender.name == cell.model for cell, contender in jobs)


def ladder_of(place: Path, folder: Path, *steps: int) -> Path:
    """A run folder of such rungs: exports of one number of steps each."""
    for k in steps:
        rung = rung_folder(folder, k)
        shutil.copytree(place / "lcm", rung)
        facts = json.loads((rung / FACTS).read_text())
        (rung / FACTS).write_text(json.dumps({**facts, "steps": [k]}))
    return folder


def cells_of(place: Path, student: Path, *more: str) -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [w for w in bench_words(place, place / "unused", *more, student=student)[1:] if w != "--steps=2,1"]
    jobs = module.cells(
        BenchOptions.read(vars(parser.parse_args(words))), open_contenders(str(place / "sd"), [str(student)])
    )
    assert all(cell.steps in contender.steps((cell.steps,)) for cell, contender in jobs)
    return [cell.slug for cell, _ in jobs]


def test_without_steps_each_student_makes_those_that_it_is_for(place: Path, tmp_path: Path) -> None:
    ladder = ladder_of(place, tmp_path / "ladder", 2, 5)
    teacher = ["teacher-3-3", "teacher-5-3", "teacher-2-3"]
    assert cells_of(place, ladder) == [*teacher, "ladder-5-1", "ladder-2-1"]
    assert cells_of(place, ladder, "--steps=4,2") == ["teacher-3-3", "teacher-2-3", "ladder-2-1"]
    assert cells_of(place, ladder / "rungs" / "5") == ["teacher-3-3", "teacher-5-3", "ladder-5-5-1"]
    usual = ["8", "4", "2", "1"]
    assert cells_of(place, place / "lcm") == [
        "teacher-3-3",
        *(f"teacher-{k}-3" for k in usual),
        *(f"lcm-{k}-1" for k in usual),
    ]
    with pytest.raises(InputError, match=r"among the rungs of --student ladder, 5, 2, got none; fix --steps"):
        cells_of(place, ladder, "--steps=4,1")


def test_a_ladder_with_a_broken_rung(place: Path, tmp_path: Path) -> None:
    ladder = ladder_of(place, tmp_path / "ladder", 2, 1)
    (ladder / "rungs" / "1" / FACTS).write_text("{}")
    with pytest.raises(InputError, match=r"expected stepdistill.json of an export in --student .*ladder"):
        cells_of(place, ladder)


@FEW
def test_too_few_real_images_give_no_floor(flags: Any, tmp_path: Path, place: Path) -> None:
    few = tiny_images(tmp_path / "few", count=15)
    cli.main([w if not w.startswith("--data") else f"--data={few}" for w in flags(tmp_path / "out", "--skip_latency")])
    results = Results.read(tmp_path / "out" / "results.json")
    assert results.floor(COUNT) is None and not results.protocol["real"]
    assert any("3 real images are held out, fewer than N = 12" in n and "24 images or more" in n for n in results.notes)


@FEW
def test_statistics_that_were_made_before(
    flags: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "photos.safetensors"
    words = ["--data", str(place / "photos"), "--resolution", "32", "--num_images", str(COUNT)]
    cli.main(["bench", "--make_reference", str(file), *words])
    assert "18 images, 12 held out" in capsys.readouterr().out
    outputs = []
    for name, data in (("a", "photos"), ("b", str(file))):
        cli.main(flags(tmp_path / name, "--skip_latency", data=data))
        outputs.append(Results.read(tmp_path / name / "results.json"))
    assert outputs[0].quality == outputs[1].quality and outputs[0].protocol == outputs[1].protocol
    Reference.measure(Corners(), DataImages(str(place / "photos")), 16, COUNT).save(file)
    cli.main(flags(tmp_path / "b", "--skip_latency", data=str(file)))
    assert any(
        "read at 16 pixels, generated ones have 32" in n for n in Results.read(tmp_path / "b" / "results.json").notes
    )


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_student(tmp_path_factory.mktemp("runs") / "untrained")


@FEW
def test_the_demo_out_of_the_box(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher and the judge that ship, captions that the judge can check, real images of the same captions."""
    monkeypatch.setattr(module, "RESAMPLES", 10)
    monkeypatch.setattr(module, "write_report", lambda *_: None)
    words = ["--student", str(untrained), "--steps", "1", "--teacher_steps", "2", "--num_images", "16"]
    words += ["--diversity_prompts", "2", "--diversity_images", "2", "--skip_latency", "--output_dir", str(tmp_path)]
    cli.main(["bench", "--teacher", "demo", *words])
    results = Results.read(tmp_path / "results.json")
    assert [(row.cell.model, row.cell.guidance) for row in results.quality] == [
        ("teacher", 1.5), ("teacher", 1.5), ("untrained", 1.0),
    ]  # fmt: skip
    values = results.quality[0].values
    assert {"accuracy", "accuracy/first shape", "diversity"} < values.keys()
    assert results.real(16, "accuracy") == Value(1.0, (1.0, 1.0)) and results.floor(16) is not None
    assert results.protocol["reference"]["count"] == 20_000 and "demo" in results.protocol["prompts"]["source"]
    assert results.quality[1].values["fd"].value > 2 * values["fd"].value  # a single step is worse


@pytest.mark.slow
@FEW
def test_accuracy_is_of_the_demos_captions_at_the_demos_size(
    flags: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge can't check other prompts, and can't see images of another size."""
    captions = World.captions
    monkeypatch.setattr(World, "captions", lambda world, indices: [c[:20] for c in captions(world, indices)])
    cli.main(flags(tmp_path / "small", "--skip_latency", "--steps=1", "--prompts=demo", "--num_images=4"))
    words = [f"--prompts={place / 'prompts.txt'}", "--num_images=4", "--steps=1", "--teacher_steps=1", "--skip_latency"]
    cli.main(["bench", "--teacher=demo", "--diversity_images=0", f"--output_dir={tmp_path / 'other'}", *words])
    for name in ("small", "other"):
        results = Results.read(tmp_path / name / "results.json")
        assert results.protocol["scores"] == {} and "accuracy" not in results.quality[0].values


def test_the_statistics_that_ship_are_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped.safetensors")
    monkeypatch.setattr(module, "WorldImages", lambda: WorldImages(9))
    Reference.measure(Corners(), WorldImages(12), 16).save(module.SHIPPED)
    for resolution, count in ((16, 12), (32, 9)):
        assert module._reference("demo", Corners(), resolution, 4, tmp_path)().count == count
    assert Reference.load(tmp_path / module.REFERENCE, Corners()).about["resolution"] == 32


def test_one_bar_is_told_of_all_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bars: list[Any] = []
    original = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **how: bars.append(original(**how)) or bars[-1])
    move = module._bar("real images")
    assert not bars  # nothing to tell yet
    for done in (3, 5, 8):
        move(done, 8)
    assert [(bar.n, bar.total, bar.disable) for bar in bars] == [(8, 8, True)]  # closed
    assert "real images: 100%" in capsys.readouterr().err
