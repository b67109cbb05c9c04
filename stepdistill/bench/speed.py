"""How long the cells of a sweep take: one pass over all of them, in turns, after the images are made; redone whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from .features import Images
from .latency import latency_pass
from .memory import BatchSizes, batch_sizes_that_fit, first_call
from .plan import Plan
from .rows import Cell, Speed
from .stages import Stages, timed_call
from .sweep import Job

REPEATS = 5  # timed calls a cell and batch size
STAGED = 3  # further calls, timed by parts
PARTS = ("text", "denoiser", "decode", "rest")

Progress = Callable[[str], object]


def speeds(
    jobs: Sequence[Job],
    plan: Plan,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = REPEATS,
    progress: Progress = lambda what: None,
) -> tuple[list[Speed], list[str]]:
    """Speed of each cell at each batch size that fits, and sentences on those that don't.

    Args:
        jobs: the cells, all open at once.
        plan: prompts, seed and resolution.
        batch_sizes: images a call.
        repeats: timed calls of each; fewer of them, at most 3, are timed by parts.
        progress: gets a word on what is done next.
    """
    sizes = sorted(set(batch_sizes))
    first: dict[Cell, float] = {}
    fits: dict[Cell, BatchSizes] = {}
    calls = {cell: partial(_call, cell, contender, plan) for cell, contender in jobs}
    for cell, call in calls.items():
        progress(f"first call and memory of {cell}")
        # out of memory: what is next finds so too, or raises what else it was
        with suppress(MemoryError, RuntimeError):
            first[cell] = first_call(lambda call=call: partial(call, sizes[0]))  # type: ignore[misc]
        fits[cell] = batch_sizes_that_fit(sizes, call)
    found = []
    for size in sizes:
        able = [job for job in jobs if size in fits[job[0]].fit]
        progress(f"batches of {size} of {len(able)} cells in turns")
        timings = latency_pass({str(cell): calls[cell] for cell, _ in able}, [size], repeats) if able else {}
        for cell, contender in able:
            stages = [timed_call(contender.pipe, partial(calls[cell], size)) for _ in range(min(STAGED, repeats))]
            rise = fits[cell].peaks[size].rise
            found.append(
                Speed(
                    cell=cell,
                    batch_size=size,
                    seconds=timings[str(cell), size].seconds,
                    stages={name: tuple(vars(stage)[name] for stage in stages) for name in PARTS},
                    evaluations=_evaluations(stages),
                    first_call=first.get(cell) if size == sizes[0] else None,
                    peak_memory=rise + _weights(contender.pipe),
                )
            )
    order = {cell: number for number, (cell, _) in enumerate(jobs)}
    found.sort(key=lambda speed: (order[speed.cell], speed.batch_size))
    notes = [f"{cell}: batches of {fit.too_large} {fit.reason}." for cell, fit in fits.items() if fit.too_large]
    return found, notes


def _call(cell: Cell, contender: Any, plan: Plan, size: int) -> Images:
    """One batch of the first prompts, from the top again where there are fewer."""
    prompts = [plan.prompts[i % len(plan.prompts)] for i in range(size)]
    images: Images = contender.images(cell, prompts, plan)
    return images


def _evaluations(stages: Sequence[Stages]) -> float:
    return stages[0].evaluations


def _weights(pipe: Any) -> int:
    """Bytes of all parameters of a pipeline: what it holds even where several share them."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
