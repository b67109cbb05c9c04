"""The demo's measurement: teacher and student on the captions of the demo world, judged by its own classifier.

The world draws what a caption asks for, so everything has a known best: real images of the very same captions give the floor
of the distance and the ceiling of the accuracy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..demo.world import ATTRIBUTES, REFERENCE_SEED, TEST_SEED, World
from ..errors import InputError
from .features import Images, JudgeFeatures, to_images
from .generate import denoiser_of, generate
from .grid import picture_grid
from .latency import count_evaluations, measure
from .metrics import bootstrap_interval, floor, frechet_distance, frechet_to, prompt_accuracy, prompt_hits
from .table import Results, Row

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from .judge import Judge

Say = Callable[[str], None]

N = 640  # images a configuration: 10 for each dimension of the judge's features
REFERENCE_N = 2000
RESAMPLES = 300
REPEATS = 5  # timed calls a configuration
GRID = 8  # prompts in the picture grid


class Yardstick:
    """What every configuration is measured with: prompts and their labels, reference images, floor and ceiling.

    Args:
        judge: classifier of the demo world.
        n: images a configuration, the first n captions of the test world; InputError below 2.
        seed: of the noise of the images and of the bootstrap.
    """

    def __init__(self, judge: Judge, n: int = N, seed: int = 0) -> None:
        if n < 2:
            raise InputError(f"expected at least 2 images a configuration, got {n}; raise the number of images")
        self.n, self.seed, self.features = n, seed, JudgeFeatures(judge)
        test, reference = World(TEST_SEED, judge.resolution), World(REFERENCE_SEED, judge.resolution)
        self.prompts = test.captions(range(n))
        self.labels = dict(zip(ATTRIBUTES, test.labels(range(n)).unbind(1), strict=True))
        real = to_images(test.pixels(range(n)))
        self.reference = self.features(to_images(reference.pixels(range(REFERENCE_N))))
        self._distance = frechet_to(self.reference)
        self.floor = floor(self.features(real), self.reference)
        self.ceiling = prompt_accuracy(self.features.logits(real), self.labels)

    def row(self, model: str, steps: int, guidance: float, images: Images, evaluations: float) -> Row:
        """The row, not timed yet, of a configuration's images, one for each of `prompts`."""
        features, logits = self.features(images), self.features.logits(images)
        right = prompt_hits(logits, self.labels)["all"].double()
        interval = partial(bootstrap_interval, n=RESAMPLES, seed=self.seed, paired=True)
        return Row(
            model=model,
            steps=steps,
            guidance=guidance,
            frechet=frechet_distance(features, self.reference),
            interval=interval(self._distance, features, centred=True),
            accuracy=prompt_accuracy(logits, self.labels),
            accuracy_interval=interval(lambda hits: float(hits.mean()), right),
            seconds=(),
            evaluations=evaluations,
            n=self.n,
        )

    def identity(self) -> dict[str, Any]:
        """The part of the protocol that must be equal for distances to compare."""
        return {
            "features": {"name": self.features.name, "hash": self.features.weights_hash, "dim": self.features.dim},
            "seeds": {"noise": self.seed, "prompts": TEST_SEED, "reference": REFERENCE_SEED},
            "reference": f"the first {REFERENCE_N} images of the reference world, the same for every row",
        }

    def protocol(self) -> dict[str, Any]:
        """How the numbers are made, for the results file."""
        return {
            **self.identity(),
            "n": self.n,
            "prompts": "the first n captions of the test world, one image each, initial noise by prompt",
            "floor": {str(self.n): self.floor},
            "ceiling": self.ceiling,
            "bootstrap": f"{RESAMPLES} resamples of the images, reference fixed, distances centred for their bias",
            "seconds": f"pipeline calls with one prompt, {REPEATS} of them, configurations in turns",
        }


def evaluate(
    pipe: DiffusionPipeline,
    yardstick: Yardstick,
    model: str,
    steps: Sequence[int],
    guidance: float,
    say: Say = print,
) -> list[Row]:
    """A row for each number of steps, not timed yet; `say` gets a line as each is done.

    Raises InputError for no steps.
    """
    if not steps:
        raise InputError("expected one number of steps or more, got none; give some, e.g. 8,4,2,1")
    rows = []
    for k in steps:
        start = time.perf_counter()
        with count_evaluations(denoiser_of(pipe)) as count:
            images = generate(pipe, yardstick.prompts, steps=k, guidance_scale=guidance, seed=yardstick.seed)
        row = yardstick.row(model, k, guidance, images, evaluations=count.samples / len(images))
        rows.append(row)
        took = time.perf_counter() - start
        say(f"{model}, {k} steps: distance {row.frechet:.3g}, all right {row.accuracy['all']:.1%} ({took:.0f} s)")
    return rows


def timed(
    rows: Iterable[Row], pipes: Mapping[str, DiffusionPipeline], prompt: str, repeats: int = REPEATS
) -> list[Row]:
    """The rows with their seconds an image taken here, all configurations in turns; `pipes` by the rows' model."""
    rows = list(rows)
    calls = {
        str(i): partial(
            generate, pipes[row.model], [prompt], steps=row.steps, guidance_scale=row.guidance, seed=0, batch_size=1
        )
        for i, row in enumerate(rows)
    }
    seconds = measure(calls, REPEATS, warmup=1) if rows else {}
    return [replace(row, seconds=tuple(seconds[str(i)])) for i, row in enumerate(rows)]


def evaluate_student(
    pipe: DiffusionPipeline,
    judge: Judge,
    steps: Sequence[int] = (8, 4, 2, 1),
    n: int = N,
    seed: int = 0,
    guidance: float = 1.0,
    say: Say = print,
) -> list[Row]:
    """Timed rows of a student of the demo teacher, as a stock pipeline with its adapter and scheduler loaded."""
    yardstick = Yardstick(judge, n, seed)
    return timed(evaluate(pipe, yardstick, "student", steps, guidance, say), {"student": pipe}, yardstick.prompts[0])


def evaluate_teacher(
    pipe: DiffusionPipeline,
    judge: Judge,
    steps: Sequence[int] = (50, 8, 4, 2, 1),
    n: int = N,
    seed: int = 0,
    guidance: float = 3.0,
    say: Say = print,
) -> Results:
    """The results that ship with the teacher and stand above every student's rows."""
    yardstick = Yardstick(judge, n, seed)
    rows = evaluate(pipe, yardstick, "teacher", steps, guidance, say)
    return Results(timed(rows, {"teacher": pipe}, yardstick.prompts[0]), yardstick.protocol())


def shipped(path: str | os.PathLike[str], yardstick: Yardstick) -> tuple[Results | None, list[str]]:
    """The teacher's results, if they are there and were made with this yardstick; else None; and notes on them."""
    try:
        results = Results.read(path)
    except InputError as error:
        return None, [f"No rows of the teacher: {error}"]
    different = sorted(key for key, value in yardstick.identity().items() if results.protocol.get(key) != value)
    if different:
        return None, [
            f"No rows of the teacher: those shipped were made with another protocol ({', '.join(different)})."
        ]
    if results.protocol["n"] != yardstick.n:
        return results, [
            f"Teacher rows are at N = {results.protocol['n']}: their distances don't compare with N = {yardstick.n}."
        ]
    return results, []


def compare_with_teacher(
    output_dir: str | os.PathLike[str],
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    judge: Judge,
    teacher_results: str | os.PathLike[str],
    steps: Sequence[int] = (8, 4, 2, 1),
    n: int = N,
    seed: int = 0,
    guidance: float = 1.0,
    say: Say = print,
) -> Results:
    """The demo's last act: writes table.md, results.json and grid.png into `output_dir` and says the table.

    Args:
        output_dir: the run's folder.
        student: stock pipeline with the adapter and its scheduler loaded.
        teacher: stock pipeline of the bare teacher with weights of its own, for the seconds and the grid.
        judge: classifier of the demo world.
        teacher_results: the file with the teacher's quality numbers; its seconds are taken anew on this machine.
        steps, guidance: of the student.
        n, seed: as in `Yardstick`.
        say: gets each line.

    Raises ValueError if the two pipelines share their denoiser, as the student's adapter would then be in both.
    """
    if denoiser_of(student) is denoiser_of(teacher):
        raise ValueError(
            "expected pipelines with denoisers of their own, got one shared by both; load the teacher again"
        )
    yardstick, folder = Yardstick(judge, n, seed), Path(output_dir)
    reference, notes = shipped(teacher_results, yardstick)
    rows = [*(reference.rows if reference else []), *evaluate(student, yardstick, "student", steps, guidance, say)]
    pipes = {**{row.model: teacher for row in rows}, "student": student}
    rows = timed(rows, pipes, yardstick.prompts[0])
    protocol = yardstick.protocol()
    if reference:
        protocol["floor"] = {**reference.protocol["floor"], **protocol["floor"]}
    ceiling = f"Real images of the same captions: {yardstick.ceiling['all']:.1%} all right."
    results = Results(rows, protocol, notes=[ceiling, _seconds_note(), *notes])
    results.write(folder / "results.json")
    (folder / "table.md").write_text(results.markdown(), encoding="utf-8")
    write_grid(folder / "grid.png", rows, pipes, yardstick)
    say(f"\n{results.markdown()}")
    return results


def _seconds_note() -> str:
    threads = torch.get_num_threads()
    return f"Seconds an image: median of {REPEATS} pipeline calls with one prompt on this machine, {threads} threads."


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
