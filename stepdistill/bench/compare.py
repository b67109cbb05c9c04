"""Two results files side by side.

What two files say can only be told apart by their intervals: no prompts are drawn for both. So where the intervals of two
values overlap, the values are called indistinguishable, and where there are none, nothing is ranked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .quantities import Quantity, quantity
from .rows import TEACHER, Cell, Quality, Results, Speed, Value
from .table import aligned, escaped

SECONDS = Quantity("seconds", "s / image", "lower", note="median of calls")
MACHINE = ("machine", "cpus", "threads", "accelerator")  # what seconds of two files must have in common
MANY = 4  # cells that are named


@dataclass(frozen=True)
class Pair:
    """One quantity of one cell in both files.

    Attributes:
        cell: of the first file.
        other: of the second, which differs where a student has another name there.
        size: number of images, for seconds the batch size.
        key: of the quantity; "seconds" for the median seconds an image.
        a, b: None where a file doesn't have it.
    """

    cell: Cell
    other: Cell
    size: int
    key: str
    a: Value | None
    b: Value | None

    @property
    def overlap(self) -> bool | None:
        """Whether the intervals have a point in common; None without both."""
        if self.a is None or self.b is None or self.a.interval is None or self.b.interval is None:
            return None
        return self.a.interval[0] <= self.b.interval[1] and self.b.interval[0] <= self.a.interval[1]

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.cell}, {'batch' if self.key == SECONDS.key else 'N ='} {self.size:,}"

    def verdict(self) -> str:
        """What the second value is to the first, in a word or two; nothing is ranked without intervals that are apart."""
        if self.a is None or self.b is None:
            return "missing"
        if self.a.value == self.b.value:
            return "equal"
        if self.overlap is None:
            return "no interval"
        if self.overlap:
            return "indistinguishable"
        better = of(self.key).better
        return (
            "differs"
            if better == "neither"
            else "better"
            if (self.b.value < self.a.value) == (better == "lower")
            else "worse"
        )


@dataclass(frozen=True)
class Comparison:
    """Two results side by side.

    Attributes:
        pairs: of all cells that both have, in the order of the first file.
        changed: keys of the protocol that differ, with both values.
        machine: what seconds depend on and differs, with both values.
        only_a, only_b: cells (with their number of images or batch size) that the other file lacks.
    """

    pairs: tuple[Pair, ...]
    changed: tuple[str, ...]
    machine: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """Sentences about what makes the numbers hard to compare."""
        said = (
            [f"The protocols differ, so the numbers don't compare: {'; '.join(self.changed)}"] if self.changed else []
        )
        said += [f"The machines differ, so seconds don't compare: {'; '.join(self.machine)}"] if self.machine else []
        said += [f"Only in the first: {_some(self.only_a)}"] if self.only_a else []
        return said + ([f"Only in the second: {_some(self.only_b)}"] if self.only_b else [])

    def text(self) -> str:
        """Warnings, and a Markdown table of all pairs that differ, single attributes of prompts left out."""
        head = ["model", "steps", "guidance", "N or batch", "quantity", "first", "second", "change", "second is"]
        shown = [pair for pair in self.pairs if "/" not in pair.key]
        different = [pair for pair in shown if pair.verdict() != "equal"]
        lines = aligned(head, [_cells(pair) for pair in different]) if different else []
        if equal := len(shown) - len(different):
            lines += [*([""] if lines else []), f"{equal} number{'s are' if equal > 1 else ' is'} equal in both files."]
        warned = [f"> {escaped(line)}" for line in self.warnings]
        return "\n".join([*warned, *([""] if warned else []), *(lines or ["No cell is in both files."])]) + "\n"


def _some(places: Sequence[str]) -> str:
    """The first few of them."""
    rest = len(places) - MANY
    return ", ".join(places[:MANY]) + (f" and {rest} more" if rest > 0 else "")


def _cells(pair: Pair) -> list[str]:
    what, same = of(pair.key), pair.cell.model == pair.other.model
    model = escaped(pair.cell.model if same else f"{pair.cell.model} / {pair.other.model}")
    place = [model, str(pair.cell.steps), f"{pair.cell.guidance:g}", str(pair.size), what.label]
    return [*place, _spelled(pair.a, what.form), _spelled(pair.b, what.form), change(pair), pair.verdict()]


def _spelled(value: Value | None, form: str) -> str:
    if value is None:
        return ""
    span = "" if value.interval is None else f" [{value.interval[0]:{form}}, {value.interval[1]:{form}}]"
    return f"{value.value:{form}}{span}"


def change(pair: Pair) -> str:
    """By which share the second value is more than the first, where the first is positive."""
    if pair.a is None or pair.b is None or pair.a.value <= 0:
        return ""
    return f"{pair.b.value / pair.a.value - 1:+.1%}"


def of(key: str) -> Quantity:
    """The quantity of a key, seconds too; KeyError for unknown keys."""
    return SECONDS if key == SECONDS.key else quantity(key)


def compare(a: Results, b: Results) -> Comparison:
    """Puts the cells of both together by model, steps, guidance and number of images (seconds: batch size).

    A file with one student compares with a file with one student whatever their names.
    """
    names = _names(a, b)
    pairs: list[Pair] = []
    quality_b = {(row.cell, row.n): row for row in b.quality}
    speed_b = {(row.cell, row.batch_size): row for row in b.speed}
    for row in a.quality:
        other = quality_b.get((_there(row.cell, names), row.n))
        pairs += _quality(row, other) if other is not None else []
    for timed in a.speed:
        other_timed = speed_b.get((_there(timed.cell, names), timed.batch_size))
        if other_timed is not None:
            ours, theirs = median(timed), median(other_timed)
            pairs.append(Pair(timed.cell, other_timed.cell, timed.batch_size, SECONDS.key, ours, theirs))
    matched_a, matched_b = _places(a, names), _places(b, {})
    return Comparison(
        tuple(pairs),
        changed=tuple(differences(a.identity, b.identity)),
        machine=tuple(_machines(a, b)) if a.speed and b.speed else (),
        only_a=tuple(place for key, place in matched_a.items() if key not in matched_b),
        only_b=tuple(place for key, place in matched_b.items() if key not in matched_a),
    )


def _machines(a: Results, b: Results) -> list[str]:
    ours, theirs = ({key: r.environment.get(key) for key in MACHINE} for r in (a, b))
    return differences(ours, theirs)


def _names(a: Results, b: Results) -> dict[str, str]:
    """The first file's student -> the second's, where each has one and they are called differently."""
    ours, theirs = _students(a), _students(b)
    return dict(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) == 1 else {}


def _students(results: Results) -> set[str]:
    return ({row.cell.model for row in results.quality} | {s.cell.model for s in results.speed}) - {TEACHER}


def _there(cell: Cell, names: Mapping[str, str]) -> Cell:
    return Cell(names.get(cell.model, cell.model), cell.steps, cell.guidance)


def _places(results: Results, names: Mapping[str, str]) -> dict[tuple[Any, ...], str]:
    """(what, cell as the second file calls it, size) -> words."""
    quality = {("N", _there(r.cell, names), r.n): f"{r.cell} (N = {r.n:,})" for r in results.quality}
    return quality | {
        ("batch", _there(s.cell, names), s.batch_size): f"{s.cell} (batch {s.batch_size})" for s in results.speed
    }


def _quality(row: Quality, other: Quality) -> list[Pair]:
    keys = dict.fromkeys([*row.values, *other.values])
    return [Pair(row.cell, other.cell, row.n, key, row.values.get(key), other.values.get(key)) for key in keys]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], above: str = "") -> list[str]:
    """Keys at which nested mappings differ, as "key.key: value -> value"."""
    said = []
    for key in dict.fromkeys([*a, *b]):
        ours, theirs, name = a.get(key, "none"), b.get(key, "none"), f"{above}{key}"
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            said += differences(ours, theirs, f"{name}.")
        elif ours != theirs:
            said.append(f"{name}: {ours} -> {theirs}")
    return said


def median(speed: Speed) -> Value:
    """Median seconds an image; its interval are the order statistics that hold the true median 95 times in 100 or more.

    From 6 calls on; of fewer it is all that was seen.
    """
    n, ordered, below, rank = len(speed.seconds), sorted(speed.seconds), 0.0, 0
    while rank < n // 2 and (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    rank = max(rank, 1)
    low, high = ordered[rank - 1] / speed.batch_size, ordered[n - rank] / speed.batch_size
    return Value(float(np.median(ordered)) / speed.batch_size, (low, high))
