"""What the report's plots share: scales that fit the values, bands of intervals, labels beside lines instead of a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import ticker

from .rows import Value
from .svg import INK, SIZE, spread

_LINE = 0.075  # height of a label, in heights of the axes
_LOG = 8.0  # values that span this factor are drawn on a logarithmic axis
_FEW = 4.0  # and one that spans less than this has too few round numbers of its own


@dataclass(frozen=True)
class Label:
    """Names a line at its last point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    look: dict[str, Any]


def scale(axes: Any, which: Literal["x", "y"], values: Sequence[float], log: bool, ends: Sequence[float] = ()) -> None:
    """Limits that hold all values and the ends of their intervals, with round ticks.

    On a logarithmic axis an interval that reaches far below the values, or below 0, is cut.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(*values, *ends, *values[:1]), max(*values, *ends, *values[:1])
    if log:
        low = max(low, min(values) / 3)
        axes.set(**{f"{which}scale": "log"})
        limits = (low / 1.15, high * 1.15)
        few = high / low < _FEW
        ticks = ticker.MaxNLocator(4).tick_values(low, high) if few else ()
        axis.set_major_locator(ticker.FixedLocator(ticks) if few else ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        limits = (low - pad, high + pad)
    axes.set(**{f"{which}lim": limits})


def fit_to(axes: Any, values: Sequence[Value], real: Value | None, log: bool) -> None:
    """The y axis for these values and what real images score; if `log`, logarithmic where they are positive and far apart."""
    centres = [value.value for value in [*values, *([real] if real else [])]]
    ends = [end for value in [*values, *([real] if real else [])] for end in value.interval or ()]
    scale(axes, "y", centres, log and min(centres) > 0 and max(centres) / min(centres) > _LOG, ends)


def bars(values: Sequence[Value]) -> tuple[list[float], list[float]]:
    """Lengths of error bars down and up; 0 where there is no interval, or where it doesn't hold the value itself."""
    spans = [value.interval or (value.value, value.value) for value in values]
    down = [max(value.value - low, 0.0) for value, (low, _) in zip(values, spans, strict=True)]
    return down, [max(high - value.value, 0.0) for value, (_, high) in zip(values, spans, strict=True)]


def band(axes: Any, x: Sequence[float], values: Sequence[Value], look: dict[str, Any]) -> None:
    """Intervals as a band along a line; a single point gets a bar."""
    down, up = bars(values)
    if len(x) == 1:
        axes.errorbar(x, [value.value for value in values], (down, up), color=look["color"], elinewidth=1.2)
        return
    low = [value.value - d for value, d in zip(values, down, strict=True)]
    high = [value.value + u for value, u in zip(values, up, strict=True)]
    axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def references(axes: Any, real: Value | None, teacher: tuple[str, float] | None) -> None:
    """What real images score as a band across, the teacher's own value as a dashed line; both named on them, at the left."""
    lines = []
    if real is not None:
        low, high = real.interval or (real.value, real.value)
        axes.axhspan(low, high, color=INK, alpha=0.13, linewidth=0)
        axes.axhline(real.value, color=INK, alpha=0.35, linewidth=1)
        lines.append(("real images", real.value))
    if teacher is not None:
        axes.axhline(teacher[1], color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        lines.append(teacher)
    places = spread([_fraction(axes, y) + 0.028 for _, y in lines], _LINE, high=1 - _LINE / 2)
    for (text, _), place in zip(lines, places, strict=True):
        axes.text(0.012, place, text, transform=axes.transAxes, va="center", size=SIZE - 1)


def note(axes: Any, text: str, at: tuple[float, float], above: bool) -> None:
    """A few letters at the upper right of a point, or at its lower left."""
    side = {"xytext": (5, 4)} if above else {"xytext": (-5, -4), "ha": "right", "va": "top"}
    axes.annotate(text, at, textcoords="offset points", size=SIZE - 0.5, **side)


def beside(axes: Any, labels: Sequence[Label]) -> None:
    """A name for each line at the right of the axes, tied to the line's last point; none lies over another."""
    places = spread([_fraction(axes, label.y) for label in labels], _LINE, low=0.01, high=0.99)
    for label, place in zip(labels, places, strict=True):
        look = {**label.look, "linestyle": "none"}
        axes.plot([1.045], [place], **look, transform=axes.transAxes, clip_on=False)
        tie = {
            "arrowstyle": "-",
            "color": label.look["color"],
            "alpha": 0.45,
            "linewidth": 1,
            "shrinkA": 0,
            "shrinkB": 3,
        }
        axes.annotate("", (label.x, label.y), (1.045, place), textcoords="axes fraction", arrowprops=tie)
        axes.text(1.075, place, label.text, transform=axes.transAxes, va="center", size=SIZE - 0.5)


def _fraction(axes: Any, y: float) -> float:
    """Where a value lies on the y axis, 0 at its foot and 1 at its top, whatever its scale."""
    return float((axes.transScale + axes.transLimits).transform((axes.get_xlim()[0], y))[1])
