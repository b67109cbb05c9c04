"""`stepdistill bench`: opens, sweeps, measures, times, and writes what is to be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..errors import InputError
from ..families.loading import DEMO_JUDGE
from ..training.processes import end_gloo_at_exit
from .contenders import Contender, open_contenders, side_of
from .extractors import open_features
from .features import FeatureExtractor, Images
from .fit import Line, fit_line
from .grid import picture_grid
from .infinity import SMALLEST
from .judge import Judge
from .options import BenchOptions
from .plan import Plan
from .promptfile import read_prompts
from .quality import RESAMPLES, RMS, Measure
from .quantities import ACCURACY
from .real import DataImages, WorldImages
from .reference import Progress, Reference
from .report import write_report
from .rows import TEACHER, Cell, Quality, Results
from .samples import Samples
from .scores import ClipScore, JudgeAccuracy, Scorer
from .speed import speeds
from .sweep import KEPT, Job, Sweep
from .table import markdown, to_csv
from .writing import writing
from .yardstick import SOURCE, Yardstick

SHIPPED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo_reference.safetensors"
REFERENCE = "reference.safetensors"  # in the output folder
SHOWN = 8  # prompts in the grid
CLIP = "clip_score"
LEAST = 2 * SMALLEST  # images to extrapolate from
PATIENCE = timedelta(days=7)  # of processes that wait for others, which may be downloading


@dataclass(frozen=True)
class Opened:
    """All that the flags name, loaded."""

    contenders: list[Contender]
    plan: Plan
    features: FeatureExtractor
    scorers: dict[str, Scorer]
    resolution: int


def bench(options: BenchOptions) -> Results | None:
    """A sweep from beginning to end; its results on the main process, None on the others, which only make images.

    Writes results.json, results.csv, results.md, report.html and grid.png into the output folder. Raises InputError.
    """
    state = _processes()
    opened = _open(options, state.device)
    jobs, folder = cells(options, opened.contenders), Path(options.output_dir).expanduser()
    real: Callable[[], Reference] | None = None
    if state.is_main_process:
        real = _reference(options.data, opened.features, opened.resolution, len(opened.plan.prompts), folder)
        for note in _beyond(jobs):
            warnings.warn(note, stacklevel=2)
    sweep = Sweep(
        folder,
        opened.plan,
        opened.features,
        opened.scorers,
        kept=len(opened.plan.prompts) if options.save_images else KEPT,
        overwrite=options.overwrite,
        rank=state.process_index,
        world=state.num_processes,
        wait=state.wait_for_everyone,
    )
    sweep.claim(jobs)
    measure = None if real is None else Measure(real(), options.seed, options.metrics, RESAMPLES)
    samples = sweep.run(jobs)
    if measure is None:
        return None
    n = (len(opened.plan.prompts),)
    yardstick = Yardstick(opened.plan, opened.features, opened.scorers, measure, n, opened.resolution)
    results = _results(yardstick, sweep, jobs, samples)
    if not options.skip_latency:
        results.speed, notes = speeds(jobs, opened.plan, options.batch_sizes, options.repeats, _word)
        results.notes += [_seconds_note(options, state.device), *notes]
    _write(folder, results, {cell: sweep.images(cell, SHOWN) for cell, _ in jobs}, opened.plan.prompts[:SHOWN])
    return results


def _processes() -> PartialState:
    end_gloo_at_exit()
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def _open(options: BenchOptions, device: torch.device) -> Opened:
    prompts = read_prompts(options.prompts, options.num_images)  # first: models take longer to open
    if "fd_infinity" in options.metrics and len(prompts) < LEAST:
        raise InputError(f"expected {LEAST} --prompts or more for --metrics fd_infinity, got {len(prompts)}; give more")
    source = SOURCE if options.prompts == "demo" else options.prompts
    plan = Plan(tuple(prompts), source, options.seed, options.diversity, options.batch_size, options.resolution)
    features = open_features(options.features, device=device)
    contenders = open_contenders(options.teacher, options.students, options.dtype, options.variant, device)
    read_prompts(options.prompts, options.num_images, contenders[0].pipe.components.get("tokenizer"))  # too long ones
    resolution = side_of(contenders[0], plan)
    features(np.zeros((1, resolution, resolution, 3), np.uint8))  # a wrong size is told now, not after the first images
    scorers: dict[str, Scorer] = {}
    judge = Judge.load(DEMO_JUDGE)
    if options.prompts == "demo" and resolution == judge.resolution:
        scorers[ACCURACY] = JudgeAccuracy(judge)
    if options.clip is not None:
        scorers[CLIP] = ClipScore(options.clip, device=device)
    return Opened(contenders, plan, features, scorers, resolution)


def cells(options: BenchOptions, contenders: Sequence[Contender]) -> list[Job]:
    """The cells: the teacher as it is meant, which comes first, the teacher at the students' steps, the students.

    Raises InputError for steps that a scheduler refuses.
    """
    teacher, *students = contenders
    made = {k for student in students for k in student.steps(options.steps)} or teacher.steps(options.steps)
    steps = sorted(made, reverse=True)
    jobs = [(Cell(TEACHER, k, g), teacher) for g in options.teacher_guidance for k in (options.teacher_steps, *steps)]
    for student in students:
        scales = options.guidance or (float(student.facts["guidance_scale"]),)
        steps = sorted(student.steps(options.steps), reverse=True)
        jobs += [(Cell(student.name, k, g), student) for g in scales for k in steps]
    if left := {student.name for student in students} - {cell.model for cell, _ in jobs}:
        rungs = ", ".join(str(k) for student in students if student.name in left for k in student.steps())
        raise InputError(
            f"expected --steps among the rungs of --student {', '.join(sorted(left))}, {rungs}, got none; fix --steps"
        )
    for cell, contender in jobs:
        contender.schedule(cell.steps)
    return list(dict(jobs).items())


def _beyond(jobs: Sequence[Job]) -> list[str]:
    """Sentences on cells that students were not made for."""
    return [note for cell, contender in jobs if (note := contender.note(cell))]


def _reference(data: str, features: FeatureExtractor, resolution: int, n: int, folder: Path) -> Callable[[], Reference]:
    """Of --data, which is opened now: read from a file of statistics, or, when called, measured and kept in the folder."""
    if data.endswith(".safetensors"):
        found = Reference.load(Path(data).expanduser(), features)
        return lambda: found
    bar = _bar("real images")
    if data != "demo":
        images = DataImages(data)
        return partial(Reference.remembered, folder / REFERENCE, features, images, resolution, images.held(n), bar)
    try:
        shipped = Reference.load(SHIPPED, features)
        if shipped.about["resolution"] == resolution:
            return lambda: shipped
    except InputError:
        pass
    return partial(Reference.remembered, folder / REFERENCE, features, WorldImages(), resolution, 0, bar)


def make_reference(path: str, data: str, features: str, resolution: int | None, n: int | None = None) -> Reference:
    """Writes the statistics of real images, which --data takes.

    Args:
        path: the file.
        data: as --data; "demo" too.
        features: as --features.
        resolution: side of the images in pixels; the demo's own for "demo".
        n: images of the sweeps to come; as many are held out, where that leaves as many. A fifth by default.

    Raises InputError.
    """
    side, state = resolution or Judge.load(DEMO_JUDGE).resolution, _processes()
    if state.num_processes > 1:
        raise InputError(f"expected one process for --make_reference, got {state.num_processes}; start it by itself")
    extractor = open_features(features, device=state.device)
    images: Any = WorldImages() if data == "demo" else DataImages(data)
    held = 0 if data == "demo" else images.held(n)
    found = Reference.measure(extractor, images, side, held, progress=_bar("real images"))
    found.save(path, "--make_reference")
    return found


def _results(yardstick: Yardstick, sweep: Sweep, jobs: Sequence[Job], samples: Sequence[Samples]) -> Results:
    """The quality of all cells; the first is the teacher as it is meant."""
    (first, _), own = jobs[0], sweep.images(jobs[0][0])
    rows: list[Quality] = []
    numbers: dict[str, dict[str, list[float]]] = {}
    notes, bar = _beyond(jobs), _bar("numbers and intervals")
    for done, ((cell, _), found) in enumerate(zip(jobs, samples, strict=True), 1):
        pair: dict[str, Any] = {} if cell == first else {"teacher": samples[0], "images": (sweep.images(cell), own)}
        rows += yardstick.rows(cell, found, **pair)
        numbers[cell.slug] = yardstick.measure.per_image(found, **pair)
        if found.copies:
            notes.append(f"{cell}: {found.copies} of {yardstick.n} images are copies of others.")
        bar(done, len(jobs))
    notes += _reference_notes(yardstick)
    if 0 < sweep.kept < yardstick.n and any(RMS in row.values for row in rows):
        notes.append(f"RMS to teacher: of the first {sweep.kept} images.")
    return Results(rows, yardstick.protocol(), teacher=first, samples=numbers, notes=notes)


def _reference_notes(yardstick: Yardstick) -> list[str]:
    reference, notes = yardstick.measure.reference, []
    if str(yardstick.n) not in yardstick.real:
        notes.append(
            f"No floor: {len(reference.held)} real images are held out, fewer than N = {yardstick.n}, so no ratio is clear; "
            f"give --data {2 * yardstick.n} images or more."
        )
    if reference.about["resolution"] != yardstick.resolution:
        notes.append(
            f"Real images were read at {reference.about['resolution']} pixels, generated ones have {yardstick.resolution}."
        )
    return notes


def _seconds_note(options: BenchOptions, device: torch.device) -> str:
    sizes = ", ".join(str(size) for size in options.batch_sizes)
    return (
        f"Seconds an image: {options.repeats} calls at each batch size ({sizes}), all cells in turns, on {device.type}, "
        f"{torch.get_num_threads()} threads. Memory: weights and the rise during a call."
    )


def fits(results: Results) -> dict[str, Line]:
    """Model -> seconds an image over network evaluations, at a batch of one and over all calls."""
    found: dict[str, Line] = {}
    for model in dict.fromkeys(speed.cell.model for speed in results.speed):
        own = [s for s in results.speed if s.cell.model == model and s.batch_size == 1]
        line = fit_line([s.evaluations for s in own for _ in s.seconds], [t for s in own for t in s.seconds])
        if line is not None:
            found[model] = line
    return found


def _write(folder: Path, results: Results, grid: dict[Cell, Images], prompts: Sequence[str]) -> None:
    with writing(folder):
        results.write(folder / "results.json")
        (folder / "results.csv").write_text(to_csv(results), encoding="utf-8")
        (folder / "results.md").write_text(markdown(results), encoding="utf-8")
        picture_grid(folder / "grid.png", {str(cell): images for cell, images in grid.items()}, prompts)
        write_report(folder / "report.html", results, grid, prompts, fits(results))
    print(f"{markdown(results)}\nreport: {folder / 'report.html'}")


def _bar(what: str) -> Progress:
    """A bar on stderr that is told (done, of)."""
    bars: list[tqdm] = []  # one, once there is something to tell

    def move(done: int, total: int) -> None:
        bar = bars[0] if bars else tqdm(desc=what, total=total, mininterval=0.5)
        bars[:] = [bar]
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return move


def _word(what: str) -> None:
    tqdm.write(what)
