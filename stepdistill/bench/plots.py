"""The report's plots, as inline SVG: quality against seconds and against steps, where the seconds go, seconds against NFE.

Each takes results and gives "" where it has nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from .axes import Label, band, bars, beside, fit_to, note, references, scale
from .fit import Line
from .quantities import quantity
from .rows import FD, TEACHER, Cell, Quality, Results, Speed
from .svg import FRONT, INK, SERIES, STAGES, drawing, short

WIDTH, HEIGHT = 6.6, 4.4  # inches
_MARKERS, _DASHES = "sD^vP", ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Series:
    """One line of a plot: a model at one guidance, at all its numbers of steps."""

    label: str
    rows: tuple[Quality, ...]
    colour: str
    marker: str
    dash: Any

    @property
    def look(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


def most(results: Results) -> int:
    """The largest number of images there are rows for; 0 without rows."""
    return max((row.n for row in results.quality), default=0)


def series(results: Results) -> list[Series]:
    """The lines at the largest number of images; the teacher in the colour of text, each student in one of its own."""
    rows = [row for row in results.quality if row.n == most(results)]
    students = list(dict.fromkeys(row.cell.model for row in rows if row.cell.model != TEACHER))
    found = []
    for model in dict.fromkeys(row.cell.model for row in rows):
        own = [row for row in rows if row.cell.model == model]
        scales = list(dict.fromkeys(row.cell.guidance for row in own))
        at = -1 if model == TEACHER else students.index(model)
        for i, guidance in enumerate(scales):
            line = sorted((row for row in own if row.cell.guidance == guidance), key=lambda row: row.cell.steps)
            label = short(model) + (f", g {guidance:g}" if len(scales) > 1 else "")
            colour, marker = (INK, "o") if at < 0 else (SERIES[at % len(SERIES)], _MARKERS[at % len(_MARKERS)])
            found.append(Series(label, tuple(line), colour, marker, _DASHES[i % len(_DASHES)]))
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y), both better the lower, that no other one beats in one without losing in the other; by x."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def quality_latency(results: Results) -> str:
    """Frechet distance against seconds an image at a batch of one, with the Pareto front."""
    took = {s.cell: s.image["p50"] for s in results.speed if s.batch_size == 1}
    lines = [(s, [(took[r.cell], r) for r in s.rows if r.cell in took and FD in r.values]) for s in series(results)]
    lines = [(s, points) for s, points in lines if points]
    flat = [(x, row) for _, points in lines for x, row in points]
    if not flat:
        return ""
    places = [(x, row.values[FD].value) for x, row in flat]
    front = pareto(places)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        scale(axes, "x", [x for x, _ in places], log=True)
        fit_to(axes, [row.values[FD] for _, row in flat], results.real(most(results), FD), log=True)
        references(axes, results.real(most(results), FD), None)
        axes.plot(*zip(*(places[i] for i in front), strict=True), color=FRONT, alpha=0.6, linewidth=9, zorder=1)
        labels = []
        for i, (line, points) in enumerate(lines):
            x, y = [x for x, _ in points], [row.values[FD].value for _, row in points]
            axes.errorbar(x, y, bars([row.values[FD] for _, row in points]), **line.look, elinewidth=1)
            for a, b, (_, row) in zip(x, y, points, strict=True):
                note(axes, str(row.cell.steps), (a, b), above=i % 2 == 0)
            labels.append(Label(x[-1], y[-1], line.label, line.look))
        beside(axes, labels)
        axes.set(xlabel="seconds an image, batch of 1", ylabel=_axis(FD))

    best = "; ".join(f"{flat[i][1].cell}: {places[i][0]:.3g} s, {places[i][1]:.3g}" for i in front)
    alt = f"Frechet distance against seconds an image. Pareto front: {best}. All values are in the table."
    return drawing("latency", alt, draw, (WIDTH, HEIGHT))


def quality_steps(results: Results, key: str = FD) -> str:
    """A quantity against steps: a line a model with its 95 % band, real images as a band, the teacher's own row as a line."""
    lines = [(s, [row for row in s.rows if key in row.values]) for s in series(results)]
    lines = [(s, rows) for s, rows in lines if rows]
    if not lines:
        return ""
    steps = sorted({row.cell.steps for _, rows in lines for row in rows})
    values = [row.values[key] for _, rows in lines for row in rows]
    teacher = None if results.teacher is None else results.of(results.teacher, most(results))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        scale(axes, "x", steps, log=True)
        axes.xaxis.set_major_locator(ticker.FixedLocator(steps))
        fit_to(axes, values, results.real(most(results), key), log=quantity(key).better == "lower")
        named = None
        if teacher is not None and key in teacher.values:
            named = (f"teacher at {teacher.cell.steps}", teacher.values[key].value)
        references(axes, results.real(most(results), key), named)
        labels = []
        for line, rows in lines:
            x, y = [row.cell.steps for row in rows], [row.values[key].value for row in rows]
            band(axes, x, [row.values[key] for row in rows], line.look)
            axes.plot(x, y, **line.look)
            labels.append(Label(x[-1], y[-1], line.label, line.look))
        beside(axes, labels)
        axes.set(xlabel="steps", ylabel=_axis(key))

    ends = "; ".join(f"{s.label}, {_ends(rows, key)}" for s, rows in lines)
    alt = f"{quantity(key).label} against steps. {ends}. All values are in the table."
    return drawing(f"steps-{key.replace('/', '-').replace('_', '-')}", alt, draw, (WIDTH, HEIGHT))


def breakdown(results: Results, batch_size: int = 1) -> str:
    """Where the seconds of an image go: a bar a cell of text, denoiser, decode and rest, by their medians."""
    rows = [s for s in results.speed if s.batch_size == batch_size and s.stages]
    if not rows:
        return ""
    parts = [stage_seconds(s) for s in rows]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        longest = max(sum(part.values()) for part in parts)
        for i, (speed, part) in enumerate(zip(rows, parts, strict=True)):
            left = 0.0
            for name, seconds in part.items():
                axes.barh(i, seconds, 0.36, left=left, color=STAGES.get(name, STAGES["rest"]), linewidth=0)
                left += seconds
            axes.text(left + 0.012 * longest, i, f"{left:.3g} s", va="center")
            axes.text(0, i - 0.24, _named(speed.cell), va="bottom")
        axes.set(xlabel="seconds an image", xlim=(0, longest * 1.16), ylim=(len(rows) - 0.6, -1.5), yticks=[])
        axes.spines["left"].set_visible(False)
        names = [name for name in STAGES if any(name in part for part in parts)]
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        for x, name in zip(np.arange(len(names)) * 0.23, names, strict=True):
            axes.plot([x + 0.01], [-1.1], color=STAGES[name], marker="s", markersize=9, linestyle="none", **place)
            axes.text(x + 0.035, -1.1, name, va="center", **place)

    alt = "Seconds an image by part. " + "; ".join(_spoken(s, part) for s, part in zip(rows, parts, strict=True)) + "."
    return drawing("breakdown", alt, draw, (WIDTH, 1.2 + 0.5 * len(rows)))


def fit_plot(results: Results, fits: Mapping[str, Line], batch_size: int = 1) -> str:
    """Seconds an image against network evaluations, the points that were measured and the line fitted to each model's."""
    looks = {line.rows[0].cell.model: line for line in reversed(series(results))}
    points = {
        model: [
            (s.evaluations, s.image["p50"])
            for s in results.speed
            if s.cell.model == model and s.batch_size == batch_size
        ]
        for model in fits
        if model in looks
    }
    points = {model: sorted(own) for model, own in points.items() if own}
    if not points:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        labels = []
        for model, own in points.items():
            look, last = {**looks[model].look, "linestyle": "none"}, own[-1][0]
            ends = [fits[model].seconds(x) for x in (0, last)]
            axes.plot([0, last], ends, color=look["color"], linewidth=1.2)
            axes.plot(*zip(*own, strict=True), **look)
            labels.append(Label(last, ends[-1], short(model), look))
        axes.set(
            xlim=(0, None), ylim=(0, None), xlabel="network evaluations an image", ylabel="seconds an image, batch of 1"
        )
        beside(axes, labels)

    said = "; ".join(f"{model}: {fit_words(fits[model])}" for model in points)
    return drawing("fit", f"Seconds an image against network evaluations. {said}.", draw, (WIDTH, HEIGHT))


def fit_words(fit: Line) -> str:
    """A fit as a formula, with what it explains."""
    r2 = "" if fit.r2 is None else f", R\N{SUPERSCRIPT TWO} = {fit.r2:.4f}"
    return f"t = {fit.fixed:.3g} s + {fit.per_evaluation:.3g} s x NFE ({fit.points} points{r2})"


def stage_seconds(speed: Speed) -> dict[str, float]:
    """Stage -> median seconds an image, in the order of a call."""
    order = sorted(speed.stages, key=lambda name: list(STAGES).index(name) if name in STAGES else len(STAGES))
    return {name: float(np.median(speed.stages[name])) / speed.batch_size for name in order}


def _axis(key: str) -> str:
    what = quantity(key)
    return (
        f"{what.label[:1].upper()}{what.label[1:]}"
        + {"neither": "", "lower": " (lower is better)", "higher": " (higher is better)"}[what.better]
    )


def _named(cell: Cell) -> str:
    return f"{short(cell.model, 30)}, {cell.steps} step{'s' * (cell.steps > 1)}, guidance {cell.guidance:g}"


def _ends(rows: Sequence[Quality], key: str) -> str:
    form = quantity(key).form
    ends = rows if len(rows) == 1 else (rows[0], rows[-1])
    return " to ".join(f"{row.values[key].value:{form}} at {row.cell.steps}" for row in ends)


def _spoken(speed: Speed, part: Mapping[str, float]) -> str:
    return f"{speed.cell}: " + ", ".join(f"{name} {seconds:.3g}" for name, seconds in part.items())
