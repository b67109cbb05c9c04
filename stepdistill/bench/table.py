"""Results as a table: Markdown that pastes into a model card, and CSV. A column is there if something was measured for it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from .metrics import CLEAR, ENOUGH
from .quantities import ACCURACY, Quantity, quantity
from .rows import FD, TEACHER, Quality, Results, Speed, Value
from .verdict import answers

UNCLEAR = "unclear"
_AGAINST = ("against", "against_low", "against_high")
_SHOWN = (
    "fd_infinity",
    "kid",
    "cmmd",
    "recall",
    "coverage",
    "diversity",
    "clip_score",
    ACCURACY,
)  # CSV and JSON have all


def markdown(results: Results) -> str:
    """The table with padded cells, which reads well as plain text too, and under it what one has to know to read it."""
    shown = columns(results)
    rows = [[escaped(cell(row)) for _, cell in shown] for row in results.quality]
    said = [
        f"- {escaped(line)}" for line in [*(a.headline for a in answers(results)), *legend(results), *results.notes]
    ]
    return "\n".join([*aligned([head for head, _ in shown], rows), "", *said]) + "\n"


def escaped(text: str) -> str:
    """One line of Markdown that can't end its table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


Column = tuple[str, Callable[[Quality], str]]


def columns(results: Results) -> list[Column]:
    """Heads, and what makes a row's cell, as plain text."""
    measured = {key for row in results.quality for key in row.values}
    shown: list[Column] = [
        ("model", lambda r: r.cell.model),
        ("steps", lambda r: str(r.cell.steps)),
        ("guidance", lambda r: f"{r.cell.guidance:g}"),
        ("evaluations", lambda r: f"{r.evaluations:g}"),
        (quantity(FD).label, lambda r: _spelled(FD, r.values.get(FD))),
    ]
    if any(row.against is not None for row in results.quality):
        shown.append(("against the teacher", against))
    if has_ratios(results):
        shown.append(("x teacher's best", lambda r: UNCLEAR if (x := results.times_best(r)) is None else f"{x:.2f}"))
    if any(results.gap_closed(row) is not None for row in results.quality):
        shown.append(("gap closed", lambda r: "" if (x := results.gap_closed(r)) is None else f"{x:.0%}"))
    shown += [(quantity(k).label, _reader(k)) for k in _SHOWN if k in measured]
    if any(key.startswith(f"{ACCURACY}/") for key in measured):
        shown.append(("lowest attribute", _lowest))
    if results.speed:
        shown.append(("s / image", lambda r: _seconds(results, r)))
    return [*shown, ("N", lambda r: str(r.n))]


def has_ratios(results: Results) -> bool:
    """Whether any distance can be said in multiples of the teacher's lowest."""
    return any(results.times_best(row) is not None for row in results.quality)


def against(row: Quality) -> str:
    """Whether a row's distance can be told from the teacher's, and by how much it differs then."""
    if row.against is None or row.against.interval is None:
        return ""
    low, high = row.against.interval
    return "indistinguishable" if low <= 0 <= high else f"{row.against.value:+.3g} [{low:+.3g}, {high:+.3g}]"


def _reader(key: str) -> Callable[[Quality], str]:
    return lambda row: _spelled(key, row.values.get(key))


def _spelled(key: str, value: Value | None) -> str:
    if value is None:
        return ""
    form = quantity(key).form
    if value.interval is None:
        return f"{value.value:{form}}"
    return f"{value.value:{form}} [{value.interval[0]:{form}}, {value.interval[1]:{form}}]"


def _lowest(row: Quality) -> str:
    """The attribute that is right least often."""
    shares = {k: v.value for k, v in row.values.items() if k.startswith(f"{ACCURACY}/")}
    if not shares:
        return ""
    lowest = min(shares, key=shares.__getitem__)
    return f"{quantity(lowest).label} {shares[lowest]:.1%}"


def single(results: Results, row: Quality) -> Speed | None:
    """The timings of a row's cell at its smallest batch."""
    return min((s for s in results.speed if s.cell == row.cell), key=lambda s: s.batch_size, default=None)


def _seconds(results: Results, row: Quality) -> str:
    speed = single(results, row)
    return "" if speed is None else f"{speed.image['p50']:.3g}"


def legend(results: Results) -> list[str]:
    """What one has to know to read the table, a sentence a line."""
    features = results.protocol["features"]
    lines = [f"Frechet distance by {features['name']} ({features['hash']}), lower is better. Brackets: 95 % bootstrap."]
    if results.teacher is not None and any(row.against is not None for row in results.quality):
        lines.append(
            f"Against the teacher: distance less that of {results.teacher}, same prompts drawn for both; "
            "indistinguishable where the interval holds 0."
        )
    shown = [quantity(key) for key in _SHOWN if any(key in row.values for row in results.quality)]
    lines += [f"{q.label[:1].upper()}{q.label[1:]}: {q.note}." for q in shown if q.note]
    for n in sorted({row.n for row in results.quality}):
        keys = [key for key in (FD, *_SHOWN) if results.real(n, key) is not None]
        if keys:
            scores = ", ".join(_real(results, n, quantity(key)) for key in keys)
            lines.append(f"{n} real images score: {scores}.")
        if n < ENOUGH * features.get("dim", 0):
            lines.append(
                f"N = {n} is fewer than {ENOUGH} images for each of the {features['dim']} dimensions of the features: "
                "distances are mostly sampling noise, to be read against the floor only."
            )
    if any(row.cell.model == TEACHER for row in results.quality):
        lines += _ratio_lines(results)
    return [*lines, *_timing(results)]


def _ratio_lines(results: Results) -> list[str]:
    clear = f"{CLEAR:g} standard deviations of the floor above it"
    lines = [f"No ratios of distances: the teacher's lowest is less than {clear}, or no floor was measured."]
    if has_ratios(results):
        lines = [
            "x teacher's best: distance less the floor, over the teacher's lowest at this N less the floor. "
            f"{UNCLEAR}: less than {clear}."
        ]
    if any(results.gap_closed(row) is not None for row in results.quality):
        lines += [
            "Gap closed: which share of the way from the teacher's lowest distance at the same steps to its lowest of all."
        ]
    return lines


def _timing(results: Results) -> list[str]:
    if not results.speed:
        return []
    timed = filter(None, (single(results, row) for row in results.quality))
    batches = " or ".join(str(size) for size in sorted({speed.batch_size for speed in timed}))
    facts = {"accelerator": "accelerator", "threads": "CPU threads", "torch": "torch"}
    machine = ", ".join(f"{label} {results.environment.get(key, 'unknown')}" for key, label in facts.items())
    return [f"s / image: median of calls with a batch of {batches} ({machine})."]


def _real(results: Results, n: int, what: Quantity) -> str:
    value = results.real(n, what.key)
    number = "" if value is None else f"{value.value:{what.form}}"
    return f"{what.label} {number}{' (the floor)' if what.floored else ''}"


def to_csv(results: Results) -> str:
    """One line a cell and number of images, every quantity with its interval, seconds an image at the smallest batch."""
    keys = list(dict.fromkeys(key for row in results.quality for key in row.values))
    spans = {key for row in results.quality for key, value in row.values.items() if value.interval is not None}
    heads = [name for key in keys for name in ([key, f"{key}_low", f"{key}_high"] if key in spans else [key])]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "steps", "guidance", "n", "evaluations", *heads, *_AGAINST, "seconds_p50", "batch_size"])
    for row in results.quality:
        cells: list[object] = [row.cell.model, row.cell.steps, row.cell.guidance, row.n, row.evaluations]
        for key in keys:
            value = row.values.get(key)
            cells.append("" if value is None else value.value)
            if key in spans:
                cells += ["", ""] if value is None or value.interval is None else list(value.interval)
        cells += ["", "", ""] if row.against is None else [row.against.value, *(row.against.interval or ("", ""))]
        speed = single(results, row)
        writer.writerow([*cells, *(["", ""] if speed is None else [speed.image["p50"], speed.batch_size])])
    return out.getvalue()


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up; the first column is text, the others are numbers, to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return [line(head), line(rule), *(line(row) for row in rows)]
