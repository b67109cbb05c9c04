"""Figures as inline SVG: drawn by matplotlib, coloured by the page that holds them.

Colours become CSS variables and `currentColor`, so that one drawing serves light and dark pages. Text stays text, in the page's
own font. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SIZE = 13.0  # of letters, in points; at 475 points across they can still be read on a phone
INK, PAGE, FRONT = (
    "#010203",
    "#fdfcfb",
    "#f0e441",
)  # stand for the page's text, background and marker pen; no figure uses them as colours
# Okabe and Ito's colours, which people who see fewer colours tell apart too
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STAGES = {"text": "#56b4e8", "denoiser": "#0072b1", "decode": "#e69f01", "rest": "#999998"}
VARIABLES = {
    INK: "currentColor",
    PAGE: f"var(--page, {PAGE})",
    FRONT: f"var(--front, {FRONT})",
    **{colour: f"var(--series-{i}, {colour})" for i, colour in enumerate(SERIES, start=1)},
    **{colour: f"var(--stage-{name}, {colour})" for name, colour in STAGES.items()},
}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": SIZE,
    "axes.labelsize": SIZE,
    "figure.facecolor": "none",  # the page shows through
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": SIZE - 0.5,
    "ytick.labelsize": SIZE - 0.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}
_HALO = f"; stroke: {VARIABLES[PAGE]}; stroke-width: 3; paint-order: stroke"  # so that letters can lie on lines
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_LINK = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def _own_style(name: str) -> Iterator[None]:
    """matplotlib as it comes, with our style: what a user has configured must not change a report."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        yield


def drawing(name: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    """An `<svg>` element.

    Args:
        name: letters and dashes, another one for every figure of a page: all ids begin with it.
        alt: what the figure shows, for those who don't see it.
        draw: fills the figure.
        size: width and height in inches. Only their ratio and that to the letters count: the page decides how large it is.
    """
    with _own_style(name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has other fonts
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return _inlined(out.getvalue(), name, alt)


def _inlined(text: str, name: str, alt: str) -> str:
    """The drawing without prolog, metadata, styles of its own that would hold for the whole page, and foreign ids."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if _LINK in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(_LINK).removeprefix('#')}")
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
        if "style" in element.attrib:
            element.set("style", _restyled(element.attrib["style"]) + (_HALO if element.tag == "text" else ""))
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": printable(alt),
        "style": "stroke-linejoin: round; stroke-linecap: butt",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _restyled(style: str) -> str:
    """The page's colours and the page's font."""
    kept = [part for part in style.split("; ") if not part.startswith("font-family")]
    return _COLOUR.sub(lambda found: VARIABLES.get(found[0], found[0]), "; ".join(kept))


def printable(text: str) -> str:
    """With a sign in the place of what XML does not hold: control characters, halves of surrogate pairs."""
    return "".join(c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(text: str, length: int = 22) -> str:
    """A name that fits beside a line: on one line, what can't be drawn replaced, the middle left out if it is long."""
    text = printable(" ".join(text.split()))
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"


def spread(wanted: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places in [low, high], as near to the wanted ones as they can be with `gap` between any two, in the same order.

    If they don't fit, the gap shrinks to what does.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[Any]] = []  # [sum of wanted less their offsets, count]: neighbours that touch, moved as one
    for i, index in enumerate(order):
        blocks.append([wanted[index] - gap * i, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    starts = [total / count for total, count in blocks for _ in range(count)]
    top = high - gap * (len(wanted) - 1)
    placed = [0.0] * len(wanted)
    for i, (index, start) in enumerate(zip(order, starts, strict=True)):
        placed[index] = min(max(start, low), top) + gap * i
    return placed
