"""The report: one HTML file that needs neither a network nor a script, so that it opens over SSH and in ten years.

The answer comes first and in words, then the plots, the table, the images, the seconds, and how all of it was measured.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .features import Images, checked_images
from .fit import Line
from .plots import breakdown, fit_plot, fit_words, most, quality_latency, quality_steps
from .quantities import ACCURACY, quantity
from .rows import TEACHER, Cell, Results, Speed
from .table import columns, legend
from .verdict import Answer, Verdict, answers, faster, floor_sentence

TEMPLATE = "report.html.j2"
SMALL, LARGE = 96, 256  # pixels: tiles below are shown enlarged by a whole factor, tiles above are stored scaled down
OTHERS = (ACCURACY, "recall", "coverage", "diversity", "clip_score", "kid", "cmmd", "fd_infinity", "rms_to_teacher")


@dataclass(frozen=True)
class Picture:
    """One tile: a PNG as a data URI, what it shows in words, its size on the page in pixels, and whether it is enlarged."""

    source: str
    alt: str
    width: int
    height: int
    small: bool


def write_report(
    path: str | os.PathLike[str],
    results: Results,
    grid: Mapping[Cell, Images] | None,
    prompts: Sequence[str],
    fits: Mapping[str, Line] | None = None,
) -> None:
    """Writes the page; an older one is replaced whole or not at all.

    Args:
        path: the file; parent folders are made.
        results: what was measured. The plots and the answer are about the largest number of images.
        grid: cell -> uint8 [len(prompts), H, W, 3], the same prompts and initial noise for all; None for no images.
        prompts: of the rows of the grid.
        fits: model -> seconds an image over network evaluations at a batch of one.

    Raises ValueError for unequal numbers of images and prompts.
    """
    text = page(results, grid, prompts, fits)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode("utf-8", "replace"))  # a folder's name need not be Unicode
    temporary.replace(path)


def templates() -> Environment:
    """The folder of pages."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(
    results: Results,
    grid: Mapping[Cell, Images] | None,
    prompts: Sequence[str],
    fits: Mapping[str, Line] | None = None,
) -> str:
    """The page's text; arguments and errors as `write_report`. The same arguments give the same text."""
    fits = fits or {}
    n = most(results)
    return (
        templates()
        .get_template(TEMPLATE)
        .render(
            title=_title(results),
            n=n,
            teacher=results.teacher,
            students=_students(results),
            answers=[_answer(answer, results) for answer in answers(results)],
            floor=floor_sentence(results, n),
            plots={
                "latency": Markup(quality_latency(results)),
                "steps": Markup(quality_steps(results)),
                "breakdown": Markup(breakdown(results)),
                "fit": Markup(fit_plot(results, fits)),
            },
            others=[(quantity(key), Markup(svg)) for key in OTHERS if (svg := quality_steps(results, key))],
            table=_table(results),
            legend=legend(results),
            heads=list(grid or {}),
            tiles=_tiles(grid or {}, prompts),
            speeds=[_speed(results, speed) for speed in results.speed],
            batches=sorted({speed.batch_size for speed in results.speed}),
            fits={model: fit_words(fit) for model, fit in fits.items()},
            protocol=list(facts(results.protocol)),
            environment=list(facts(results.environment)),
            fingerprint=results.fingerprint,
            notes=results.notes,
        )
    )


def _students(results: Results) -> list[str]:
    return list(dict.fromkeys(row.cell.model for row in results.quality if row.cell.model != TEACHER))


def _title(results: Results) -> str:
    *others, last = _students(results) or [""]
    if not last:
        return "Steps and quality"
    return f"How many steps {'do' if others else 'does'} {', '.join(others)}{' and ' if others else ''}{last} need?"


def _answer(answer: Answer, results: Results) -> dict[str, Any]:
    """What the template shows of an answer: the headline, and each number of steps with its kind."""
    if results.teacher is None:
        raise ValueError("expected results with a teacher, got an answer without one")
    lines = [(_kind(verdict), _bound(verdict.sentence(results.teacher))) for verdict in answer.verdicts]
    text = _bound(answer.text)
    return {
        "name": answer.name,
        "model": answer.model,
        "short": answer.short,
        "text": text[:1].upper() + text[1:],
        "lines": lines,
    }


def _bound(text: str) -> str:
    """No line ends between a number and its sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("N = ", "N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _kind(verdict: Verdict) -> str:
    if verdict.falls_short:
        return "worse"
    return verdict.kind if verdict.resolved else "unclear"


def _table(results: Results) -> dict[str, Any]:
    shown = columns(results)
    rows = [{"cells": [cell(row) for _, cell in shown], "main": row.cell == results.teacher} for row in results.quality]
    return {"heads": [head for head, _ in shown], "rows": rows}


def _tiles(grid: Mapping[Cell, Images], prompts: Sequence[str]) -> list[tuple[str, list[Picture]]]:
    """A row a prompt: the prompt, and a picture a cell."""
    for cell, images in grid.items():
        if len(checked_images(images)) != len(prompts):
            raise ValueError(f"expected an image a prompt, got {len(images)} of {cell} for {len(prompts)} prompts")
    return [
        (prompt, [_picture(images[i], f"{cell}: {prompt}") for cell, images in grid.items()])
        for i, prompt in enumerate(prompts)
        if grid
    ]


def _picture(pixels: Images, alt: str) -> Picture:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)  # leaves smaller ones as they are
    out = io.BytesIO()
    image.save(out, format="PNG")
    factor = -(-SMALL // max(image.size))
    source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return Picture(source, alt, image.width * factor, image.height * factor, small=factor > 1)


def _speed(results: Results, speed: Speed) -> dict[str, Any]:
    """A row of the table of seconds."""
    ratio = faster(results, speed.cell, speed.batch_size)
    return {
        "cell": speed.cell,
        "batch": speed.batch_size,
        "evaluations": f"{speed.evaluations:g}",
        "image": [f"{seconds:.3g}" for seconds in speed.image.values()],
        "ratio": "" if ratio is None else f"{ratio:.1f}",
        "first": "" if speed.first_call is None else f"{speed.first_call:.3g}",
        "memory": "" if speed.peak_memory is None else f"{speed.peak_memory / 2**20:,.0f}",
        "calls": len(speed.seconds),
    }


def facts(data: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as lines: a path of keys and the value."""
    for key, value in data.items():
        name = f"{above} \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} {key}" if above else str(key)
        if isinstance(value, Mapping) and set(value) == {"value", "interval"}:
            span = value["interval"]
            yield name, f"{value['value']:.4g}" + ("" if span is None else f" [{span[0]:.4g}, {span[1]:.4g}]")
        elif isinstance(value, Mapping):
            yield from facts(value, name)
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
