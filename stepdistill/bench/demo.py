"""The demo's measurement: teacher and student on the captions of the demo world, judged by its own classifier."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from .generate import denoiser_of, generate
from .grid import picture_grid
from .latency import count_evaluations, measure
from .table import TEACHER, Results, Row
from .yardstick import APART, Yardstick

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Say = Callable[[str], None]

STUDENT = "student"
REPEATS = 5  # timed calls a configuration
GRID = 8  # prompts in the picture grid


def evaluate(
    pipe: DiffusionPipeline, yardstick: Yardstick, model: str, steps: Sequence[int], guidance: float, say: Say = print
) -> list[Row]:
    """Rows, not timed yet, for each number of steps, one for each of the yardstick's sizes; `say` gets a line as each is done.

    Raises InputError for no steps.
    """
    if not steps:
        raise InputError("expected one number of steps or more, got none; give some, e.g. 8,4,2,1")
    rows: list[Row] = []
    for k in steps:
        start = time.perf_counter()
        make = partial(generate, pipe, steps=k, guidance_scale=guidance, seed=yardstick.seed)
        with count_evaluations(denoiser_of(pipe)) as count:
            images = make(yardstick.prompts)
            varied = make(yardstick.varied, start_index=APART)
        evaluations = count.samples / (len(images) + len(varied))
        rows += yardstick.rows(model, k, guidance, images, varied, evaluations)
        took = time.perf_counter() - start
        say(
            f"{model}, {k} steps, guidance {guidance:g}: distance {rows[-1].frechet:.3g}, "
            f"all right {rows[-1].accuracy['all']:.1%} ({took:.0f} s)"
        )
    return rows


def timed(rows: Iterable[Row], pipes: Mapping[str, DiffusionPipeline], prompt: str, repeats: int) -> list[Row]:
    """The rows with their seconds an image taken here, all configurations in turns; `pipes` by the rows' model."""
    rows = list(rows)
    calls = {
        str(made): partial(
            generate, pipes[made[0]], [prompt], steps=made[1], guidance_scale=made[2], seed=0, batch_size=1
        )
        for made in dict.fromkeys(row.configuration for row in rows)
    }
    seconds = measure(calls, repeats, warmup=1) if rows else {}
    return [replace(row, seconds=tuple(seconds[str(row.configuration)])) for row in rows]


def shipped(path: str | os.PathLike[str], yardstick: Yardstick) -> tuple[list[Row], list[str]]:
    """The teacher's rows at the yardstick's number of images, if they were made with this yardstick, and notes on them."""
    try:
        results = Results.read(path)
    except InputError as error:
        return [], [f"No rows of the teacher: {error}"]
    different = sorted(key for key, value in yardstick.identity().items() if results.protocol.get(key) != value)
    if different:
        return [], [f"No rows of the teacher: those shipped were made with another protocol ({', '.join(different)})."]
    rows = [row for row in results.rows if row.n == yardstick.n]
    sizes = ", ".join(str(n) for n in sorted({row.n for row in results.rows}))
    return rows, [] if rows else [f"No rows of the teacher at N = {yardstick.n}: those shipped are at {sizes}."]


def compare_with_teacher(
    output_dir: str | os.PathLike[str],
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    yardstick: Yardstick,
    teacher_results: str | os.PathLike[str],
    steps: Sequence[int] = (8, 4, 2, 1),
    guidance: float = 1.0,
    say: Say = print,
) -> Results:
    """The demo's last act: writes table.md, results.json and grid.png into `output_dir` and says the table.

    Args:
        output_dir: the run's folder.
        student: stock pipeline with the adapter and its scheduler loaded.
        teacher: stock pipeline of the bare teacher with weights of its own, for the seconds and the grid.
        yardstick: with one number of images.
        teacher_results: the file with the teacher's quality numbers; its seconds are taken anew on this machine.
        steps, guidance: of the student.
        say: gets each line.

    Raises ValueError if the two pipelines share their denoiser, as the student's adapter would then be in both.
    """
    if denoiser_of(student) is denoiser_of(teacher):
        raise ValueError(
            "expected pipelines with denoisers of their own, got one shared by both; load the teacher again"
        )
    folder, pipes = Path(output_dir), {TEACHER: teacher, STUDENT: student}
    rows, notes = shipped(teacher_results, yardstick)
    rows = [*rows, *evaluate(student, yardstick, STUDENT, steps, guidance, say)]
    rows = timed(rows, pipes, yardstick.prompts[0], REPEATS)
    results = Results(rows, yardstick.protocol(), notes=[seconds_note(), *notes])
    results.write(folder / "results.json")
    (folder / "table.md").write_text(results.markdown(), encoding="utf-8")
    write_grid(folder / "grid.png", side_by_side(results), pipes, yardstick)
    say(f"\n{results.markdown()}")
    return results


def seconds_note() -> str:
    """What the column of seconds is."""
    threads = torch.get_num_threads()
    return f"Seconds an image: median of {REPEATS} pipeline calls with one prompt on one machine, {threads} threads."


def side_by_side(results: Results) -> list[Row]:
    """The student's rows, before them the teacher's best and its best at each of the student's numbers of steps."""
    students = [row for row in results.rows if row.model == STUDENT]
    n = students[0].n
    teachers = [results.best(n), *(results.best(n, row.steps) for row in students)]
    columns = [*(row for row in teachers if row is not None), *students]
    return list({row.configuration: row for row in columns}.values())


def write_grid(
    path: str | os.PathLike[str], rows: Iterable[Row], pipes: Mapping[str, DiffusionPipeline], yardstick: Yardstick
) -> None:
    """The first prompts as every row's configuration draws them, from the same noise."""
    prompts = yardstick.prompts[:GRID]
    columns = {
        f"{row.model} {row.steps} step{'s' * (row.steps > 1)}": generate(
            pipes[row.model], prompts, steps=row.steps, guidance_scale=row.guidance, seed=yardstick.seed
        )
        for row in rows
    }
    picture_grid(path, columns, prompts)
