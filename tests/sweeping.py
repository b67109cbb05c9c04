"""Small things to sweep with: an extractor and a scorer without weights, the tiny teacher, a plan of few images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from students import opened, student_of
from tiny import tiny_images, tiny_pipeline
from torch import Tensor

from stepdistill.bench.contenders import Contender, open_contenders
from stepdistill.bench.features import Images, checked_images
from stepdistill.bench.plan import Plan
from stepdistill.bench.rows import TEACHER, Cell
from stepdistill.bench.sweep import Job, Sweep
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.student import export_student
from stepdistill.families import TeacherConfig
from stepdistill.families.loading import DEMO_TEACHER
from stepdistill.methods.lcm import LCMConfig
from stepdistill.randomness import generator
from stepdistill.training.folder import LOCK

PROMPTS = tuple(f"{letter} {other}" for letter in "abcde" for other in "xy")
STEPS = (2, 1)


class Corners:
    """Mean colours of the four quarters: 12 numbers."""

    name, dim, weights_hash = "corners", 12, "0c"

    def __call__(self, images: Images) -> Tensor:
        images = checked_images(images)
        n, h, w, _ = images.shape
        quarters = images.astype(np.float64).reshape(n, 2, h // 2, 2, w // 2, 3).mean((2, 4))
        return torch.from_numpy(quarters.reshape(n, -1) / 255)


class Greens:
    """How green an image is, and how long its prompt."""

    name, names, weights_hash = "greens", ("all", "length"), "91"

    def __call__(self, prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
        green = torch.from_numpy(images[..., 1].astype(np.float64).mean((1, 2)))
        return {"all": green, "length": torch.tensor([len(p) for p in prompts], dtype=torch.float64)}


def small_plan(**changes: Any) -> Plan:
    """10 images and 3 x 2 more, in batches of 4, 4, 2 and 4, 2."""
    return Plan(**{"prompts": PROMPTS, "source": "here", "seed": 3, "diversity": (3, 2), "batch_size": 4, **changes})


def jobs_of(contenders: Sequence[Contender], steps: Sequence[int] = STEPS) -> list[Job]:
    """The teacher guided, its students unguided."""
    return [(Cell(c.name, k, 3.0 if c.name == TEACHER else 1.0), c) for c in contenders for k in steps]


@functools.cache
def teacher_of(folder: Path) -> Contender:
    """The teacher alone, opened once."""
    return open_contenders(str(folder), [])[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, but the lock of whoever was there last."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def drawn(self: Contender, cell: Cell, prompts: Sequence[str], plan: Plan, start: int = 0) -> Images:
    """In place of a pipeline's, where it doesn't matter what the images show: noise of the cell and the index."""
    return np.stack(
        [generator(cell.slug, start + i).integers(256, size=(8, 8, 3), dtype=np.uint8) for i in range(len(prompts))]
    )


def demo_student(folder: Path) -> Path:
    """The export of an adapter of the demo teacher that was never trained."""
    model = opened(DEMO_TEACHER)
    student = student_of(model, rank=2, alpha=2)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.mul_(0.1)
    return export_student(
        folder, model, student, TeacherConfig("demo"), lcm_sampling(LCMConfig(num_ddim_timesteps=20), model)
    )


def swept(folder: Path, jobs: list[Job], plan: Plan | None = None, **options: Any) -> Sweep:
    sweep = sweep_in(folder, plan, **options)
    sweep.run(jobs, progress=False)
    return sweep


def sweep_in(folder: Path, plan: Plan | None = None, **options: Any) -> Sweep:
    return Sweep(folder, plan or small_plan(), Corners(), {"accuracy": Greens()}, **{"kept": 5, **options})


class Killed(BaseException):
    """As a signal would."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> list[tuple[Cell, int]]:
    """Lets so many batches be made, then dies inside the next; a list of those that were begun."""
    original, calls = Contender.images, list[tuple[Cell, int]]()

    def images(self: Contender, cell: Cell, prompts: Any, plan: Plan, start: int = 0) -> Any:
        calls.append((cell, start))
        if len(calls) > after:
            raise Killed
        return original(self, cell, prompts, plan, start)

    monkeypatch.setattr(Contender, "images", images)
    return calls


COUNT = 12  # prompts of bench_place


def bench_place(folder: Path) -> Path:
    """Fills a folder with a teacher, a student of it, prompts and photos."""
    base = tiny_pipeline(folder / "sd")
    model = opened(base)
    export_student(folder / "lcm", model, student_of(model), TeacherConfig(str(base)), lcm_sampling(LCMConfig(), model))
    tiny_images(folder / "photos", count=30)
    (folder / "prompts.txt").write_text("".join(f"thing {i}\n" for i in range(COUNT)))
    return folder


def bench_words(place: Path, output: Path, *more: str, **changes: Any) -> list[str]:
    """Flags of a small sweep in such a folder; `changes` are paths, in it or absolute."""
    options = {"teacher": "sd", "student": "lcm", "prompts": "prompts.txt", "data": "photos", **changes}
    words = [f"--{name}={place / value}" for name, value in options.items()]
    words += ["--steps=2,1", "--teacher_steps=3", "--teacher_guidance=3", "--batch_size=5", f"--output_dir={output}"]
    return ["bench", *words, "--diversity_prompts=2", "--diversity_images=2", *more]
