"""The demo's measurement: the student of a run beside the teacher's rows that ship, on the captions of the demo world."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from .contenders import Contender
from .grid import picture_grid
from .plan import Plan
from .rows import TEACHER, Cell, Quality, Results
from .speed import REPEATS, speeds
from .sweep import Job, Sweep
from .table import markdown
from .yardstick import Yardstick

Say = Callable[[str], None]

STUDENT = "student"
GRID = 8  # prompts in the picture grid
SWEEP = "bench"  # folder of the images' numbers, in the run's


@dataclass(frozen=True)
class Entry:
    """A student, and how it is sampled.

    Attributes:
        contender: with the exported files loaded; its name is the one in the table.
        steps: numbers of steps, a row each.
        guidance: the guidance scale.
    """

    contender: Contender
    steps: tuple[int, ...]
    guidance: float = 1.0

    @property
    def jobs(self) -> list[Job]:
        """A cell for each number of steps."""
        return [(Cell(self.contender.name, k, self.guidance), self.contender) for k in self.steps]


def evaluate(
    entries: Sequence[Entry], yardstick: Yardstick, folder: str | os.PathLike[str], say: Say = print
) -> list[Quality]:
    """Rows for each number of steps, one for each of the yardstick's sizes; goes on where it was stopped.

    Args:
        entries: what makes the images, as stock pipelines.
        yardstick: what they are measured with.
        folder: where the numbers of finished images lie; those of another contender or yardstick are made again.
        say: gets a line for each cell.

    Raises InputError for no steps.
    """
    jobs = [job for entry in entries for job in entry.jobs]
    if not jobs:
        raise InputError("expected one number of steps or more, got none; give some, e.g. 8,4,2,1")
    sweep = Sweep(folder, yardstick.plan, yardstick.features, yardstick.scorers, kept=0, overwrite=True)
    rows: list[Quality] = []
    for (cell, _), samples in zip(jobs, sweep.run(jobs), strict=True):
        rows += yardstick.rows(cell, samples)
        values = rows[-1].values
        say(f"{cell}: distance {values['fd'].value:.3g}, all right {values['accuracy'].value:.1%}")
    return rows


def shipped(path: str | os.PathLike[str], yardstick: Yardstick) -> tuple[list[Quality], list[str]]:
    """The teacher's rows at the yardstick's number of images, if they were made with this yardstick, and notes on them."""
    try:
        results = Results.read(path)
    except InputError as error:
        return [], [f"No rows of the teacher: {error}"]
    different = sorted(key for key, value in yardstick.identity().items() if results.protocol.get(key) != value)
    if different:
        return [], [f"No rows of the teacher: those shipped were made with another protocol ({', '.join(different)})."]
    rows = [row for row in results.quality if row.n == yardstick.n]
    sizes = ", ".join(str(n) for n in sorted({row.n for row in results.quality}))
    return rows, [] if rows else [f"No rows of the teacher at N = {yardstick.n}: those shipped are at {sizes}."]


def compare_with_teacher(
    output_dir: str | os.PathLike[str],
    students: Sequence[Entry],
    teacher: Contender,
    yardstick: Yardstick,
    teacher_results: str | os.PathLike[str],
    say: Say = print,
) -> Results:
    """The demo's last act: writes table.md, results.json and grid.png into `output_dir` and says the table.

    Args:
        output_dir: the run's folder.
        students: one, or the rungs of a ladder under one name.
        teacher: for the seconds and the grid.
        yardstick: with one number of images.
        teacher_results: the file with the teacher's quality numbers; its seconds are taken anew on this machine.
        say: gets each line.

    Raises ValueError if a student shares the teacher's denoiser, as its adapter would then be in both.
    """
    if any(entry.contender.pipe.unet is teacher.pipe.unet for entry in students):
        raise ValueError(
            "expected pipelines with denoisers of their own, got one shared by both; load the teacher again"
        )
    folder, own = Path(output_dir), dict(job for entry in students for job in entry.jobs)
    rows, notes = shipped(teacher_results, yardstick)
    rows = [*rows, *evaluate(students, yardstick, folder / SWEEP, say)]
    jobs = [(row.cell, own.get(row.cell, teacher)) for row in rows]
    timed, _ = speeds(jobs, yardstick.plan, repeats=REPEATS)
    results = Results(rows, yardstick.protocol(), timed, notes=[seconds_note(), *notes])
    results.teacher = None if (best := results.best(yardstick.n)) is None else best.cell
    results.write(folder / "results.json")
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    columns = [(cell, own.get(cell, teacher)) for cell in side_by_side(results)]
    write_grid(folder / "grid.png", columns, yardstick.plan)
    say(f"\n{markdown(results)}")
    return results


def seconds_note() -> str:
    """What the column of seconds is."""
    threads = torch.get_num_threads()
    return f"Seconds an image: median of {REPEATS} pipeline calls with one prompt on one machine, {threads} threads."


def side_by_side(results: Results) -> list[Cell]:
    """The students' cells, before them the teacher's best and its best at each of the students' numbers of steps."""
    students = [row for row in results.quality if row.cell.model != TEACHER]
    n = students[0].n
    teachers = [results.best(n), *(results.best(n, row.cell.steps) for row in students)]
    columns = [*(row for row in teachers if row is not None), *students]
    return list(dict.fromkeys(row.cell for row in columns))


def write_grid(path: str | os.PathLike[str], jobs: Iterable[Job], plan: Plan) -> None:
    """The first prompts as every cell draws them, from the same noise."""
    prompts = plan.prompts[:GRID]
    columns = {
        f"{cell.model} {cell.steps} step{'s' * (cell.steps > 1)}": contender.images(cell, prompts, plan)
        for cell, contender in jobs
    }
    picture_grid(path, columns, prompts)
