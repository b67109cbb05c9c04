"""The sweep: what its files hold, what lies in the folder from before, how processes share it, and what it refuses."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from sweeping import (
    PROMPTS,
    Corners,
    Greens,
    Killed,
    drawn,
    dying,
    files_of,
    jobs_of,
    small_plan,
    sweep_in,
    swept,
)

from stepdistill.bench.contenders import Contender
from stepdistill.bench.generate import generate
from stepdistill.bench.plan import APART, Plan
from stepdistill.bench.rows import Cell
from stepdistill.bench.samples import image_hashes
from stepdistill.bench.sweep import Job, Sweep
from stepdistill.errors import InputError


def test_the_samples_are_those_of_the_images(jobs: list[Job], tmp_path: Path) -> None:
    plan = small_plan()
    sweep = sweep_in(tmp_path, plan)
    for (cell, contender), found in zip(jobs, sweep.run(jobs, progress=False), strict=True):
        options = {"steps": cell.steps, "guidance_scale": cell.guidance, "seed": 3, "batch_size": 4}
        images = generate(contender.pipe, PROMPTS, **options)
        varied = generate(contender.pipe, plan.varied, start_index=APART, **options)
        assert found.features.dtype == torch.float32
        torch.testing.assert_close(found.features.double(), Corners()(images), rtol=1e-6, atol=1e-6)
        assert found.spread is not None and found.spread.shape == (3, 2, 12)
        torch.testing.assert_close(found.spread.flatten(0, 1).double(), Corners()(varied), rtol=1e-6, atol=1e-6)
        scores = Greens()(PROMPTS, images)
        assert list(found.scores) == ["accuracy", "accuracy/length"]
        torch.testing.assert_close(found.scores["accuracy"], scores["all"])
        torch.testing.assert_close(found.scores["accuracy/length"], scores["length"])
        assert found.hashes is not None and torch.equal(found.hashes, image_hashes(images))
        assert found.evaluations == 2 * cell.steps  # guidance doubles them
        assert np.array_equal(sweep.images(cell), images[:5])
        assert np.array_equal(sweep.images(cell, 2), images[:2])


def test_what_is_left_of_a_cell(whole: dict[str, bytes]) -> None:
    cell = {"cell.json", "samples.safetensors", *(f"images/{i}.png" for i in range(5))}
    assert set(whole) == {f"cells/teacher-{k}-3/{name}" for k in (2, 1) for name in cell}
    tensors = {name: value.shape[:1] for name, value in load(whole["cells/teacher-1-3/samples.safetensors"]).items()}
    assert tensors == {
        "evaluations": (), "features": (10,), "hashes": (10,), "score/accuracy": (10,), "score/accuracy/length": (10,),
        "varied/features": (6,), "varied/hashes": (6,),
    }  # fmt: skip


def test_a_finished_cell_is_not_touched(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(tmp_path, jobs)
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    dying(monkeypatch, 0)
    found = sweep_in(tmp_path).run(jobs, progress=False)
    assert len(found) == 2
    for path, stat in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino), path


def test_what_lies_in_the_folder_from_before_counts_for_nothing(
    jobs: list[Job], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Leftover images, and parts that no cell.json vouches for."""
    junk = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
    place = tmp_path / "cells" / "teacher-2-3"
    for folder in (tmp_path, tmp_path / "cells", place, place / "images"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("0.png", "3.png", "77.png"):
            junk.save(folder / name)
    (place / "parts").mkdir()
    (place / "parts" / "00000.safetensors").write_bytes(whole["cells/teacher-1-3/samples.safetensors"])
    (place / "samples.safetensors").write_bytes(whole["cells/teacher-1-3/samples.safetensors"])
    sweep = swept(tmp_path, jobs)
    found = files_of(tmp_path)
    assert {name: found[name] for name in whole} == whole
    assert len(sweep.samples(jobs[0][0]).features) == len(PROMPTS)


@pytest.mark.parametrize(("world", "before"), [(2, 0), (3, 0), (2, 3), (3, 7)])
def test_processes_share_the_batches_and_agree(
    world: int, before: int, teacher: Contender, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Threads stand for processes; each has pipelines of its own. They may go on where one process was stopped."""
    if before:
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, before)
            with pytest.raises(Killed):
                swept(tmp_path, jobs_of([teacher]))
    barrier, made, found = threading.Barrier(world), {}, {}

    def run(rank: int) -> None:
        own = copy.deepcopy(teacher)
        original, calls = own.images, list[tuple[Cell, int]]()

        def images(cell: Cell, prompts: Any, plan: Plan, start: int = 0) -> Any:
            calls.append((cell, start))
            return original(cell, prompts, plan, start)

        own.images = images  # type: ignore[method-assign]
        sweep = sweep_in(tmp_path, rank=rank, world=world, wait=lambda: barrier.wait(30))
        found[rank], made[rank] = sweep.run(jobs_of([own]), progress=False), calls

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert files_of(tmp_path) == whole
    counts = [len(calls) for calls in made.values()]
    assert sum(counts) == 10 - before and (before or max(counts) - min(counts) <= 1)
    assert len({batch for calls in made.values() for batch in calls}) == 10 - before
    assert [len(found[rank]) for rank in range(world)] == [2] + [0] * (world - 1)


def test_nobody_joins_parts_while_others_look_for_theirs(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    original = Sweep._missing
    monkeypatch.setattr(Sweep, "_missing", lambda *args: events.append("looks") or original(*args))
    monkeypatch.setattr(Contender, "images", lambda *args: events.append("makes") or drawn(*args))
    sweep_in(tmp_path, wait=lambda: events.append("waits")).run(jobs[:1], progress=False)
    assert events == ["waits", "looks", "waits", *["makes"] * 5]


def test_a_process_without_the_main_ones_folder(jobs: list[Job], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output_dir a folder that all nodes share"):
        swept(tmp_path, jobs, rank=1, world=2)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 4}, "seed"),
        ({"diversity": (2, 2)}, "diversity"),
        ({"prompts": (*PROMPTS[:-1], "another")}, "prompts"),
        ({"prompts": PROMPTS[:-1]}, "num_images, prompts"),
        ({"diversity": (3, 3)}, "diversity"),
        ({"batch_size": 5}, "batch_size"),
        ({"resolution": 64}, "resolution"),
    ],
)
def test_cells_of_another_plan_are_refused(
    change: dict[str, Any], key: str, jobs: list[Job], whole: dict[str, bytes], tmp_path: Path
) -> None:
    swept(tmp_path, jobs[:1])
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=rf"got another's: {key} differ; .*--output_dir, or --overwrite"):
        swept(tmp_path, jobs, small_plan(**change))
    assert files_of(tmp_path) == before  # nothing was begun
    swept(tmp_path, jobs, small_plan(**change), overwrite=True)
    after = files_of(tmp_path)
    assert set(after) >= set(before) and all(
        after[name] != before[name] for name in before if name.endswith("cell.json")
    )
    swept(tmp_path, jobs, overwrite=True)
    assert files_of(tmp_path) == whole


def test_cells_of_other_weights_or_another_extractor(jobs: list[Job], tmp_path: Path) -> None:
    swept(tmp_path, jobs[:1])
    cell, contender = jobs[0]
    other = Contender(contender.name, contender.pipe, "another")
    with pytest.raises(InputError, match="weights differ"):
        swept(tmp_path, [(cell, other)])
    schedules = {2: {"timesteps": [9, 1]}}
    other = Contender(contender.name, contender.pipe, contender.weights, _schedules=schedules)
    with pytest.raises(InputError, match="got another's: schedule differ"):
        swept(tmp_path, [(cell, other)])
    half = copy.deepcopy(contender.pipe).to(torch.bfloat16)
    with pytest.raises(InputError, match="got another's: dtype differ"):
        swept(tmp_path, [(cell, Contender(contender.name, half, contender.weights))])
    with pytest.raises(InputError, match="images kept differ"):
        swept(tmp_path, jobs[:1], kept=10)
    sweep = sweep_in(tmp_path)
    sweep.features.weights_hash = "another"  # type: ignore[misc]
    with pytest.raises(InputError, match="features differ"):
        sweep.run(jobs[:1], progress=False)
    sweep = sweep_in(tmp_path)
    sweep.scorers = {}
    with pytest.raises(InputError, match="scores differ"):
        sweep.run(jobs[:1], progress=False)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_cell_that_says_nothing(text: str, jobs: list[Job], whole: dict[str, bytes], tmp_path: Path) -> None:
    swept(tmp_path, jobs)
    (tmp_path / "cells" / "teacher-2-3" / "cell.json").write_text(text)
    with pytest.raises(InputError, match=r"cell.json, which can't be read"):
        swept(tmp_path, jobs)
    swept(tmp_path, jobs, overwrite=True)
    assert files_of(tmp_path) == whole


def test_images_that_are_gone_or_others(jobs: list[Job], tmp_path: Path) -> None:
    sweep = swept(tmp_path, jobs[:1])
    image = tmp_path / "cells" / "teacher-2-3" / "images" / "1.png"
    data = image.read_bytes()
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(image)
    with pytest.raises(InputError, match="as they were made"):
        sweep.images(jobs[0][0])
    image.unlink()
    with pytest.raises(InputError, match=r"expected an image at .*1\.png"):
        sweep.images(jobs[0][0])
    image.write_bytes(data)
    assert len(sweep.images(jobs[0][0], 99)) == 5


def test_no_further_images_and_none_kept(jobs: list[Job], tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, small_plan(diversity=(0, 0)), kept=0)
    (found,) = sweep.run(jobs[:1], progress=False)
    assert found.spread is None and len(found.features) == len(PROMPTS) and found.evaluations == 4
    assert not list(tmp_path.rglob("*.png"))


def test_fewer_prompts_than_diversity_is_asked_of(jobs: list[Job], tmp_path: Path) -> None:
    plan = small_plan(prompts=PROMPTS[:2], diversity=(40, 2))
    (found,) = sweep_in(tmp_path, plan).run(jobs[:1], progress=False)
    assert found.spread is not None and found.spread.shape == (2, 2, 12) and found.evaluations == 4
    assert plan.identity()["diversity"] == [2, 2]
