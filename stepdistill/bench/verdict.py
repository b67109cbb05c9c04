"""The answer in words: for each student and number of steps, how near to its teacher and how much faster.

A difference is one of Frechet distances, whose common bias at N images cancels in it. It is told by its interval alone: where
that holds 0 nothing is ranked, and where it is so wide that it would hide a teacher's whole distance, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .metrics import CLEAR
from .quantities import quantity
from .rows import FD, TEACHER, Cell, Quality, Results, Value

Kind = Literal["indistinguishable", "better", "worse"]
_LARGE = 3.0  # ratios from here on are said as such, smaller ones in per cent


@dataclass(frozen=True)
class Verdict:
    """One model at one number of steps, against the teacher at the steps and guidance that it is meant for.

    Attributes:
        cell: what is judged.
        n: images that this rests on.
        kind: indistinguishable where the interval of the difference holds 0; nothing is ranked then.
        difference: of the Frechet distances, this less the teacher's.
        interval: 95 % of it, from a bootstrap that draws the same prompts for both.
        ratio: of the distances less the floor; None where one of them does not clear the floor.
        faster: the teacher's seconds an image over this one's, at a batch of one; None without timings.
        unit: the teacher's distance less the floor, in which differences are said; None where the ratio is.
        resolved: whether a difference that matters would have been seen: the interval ends below the teacher's own distance
            (or, if that is more, below what clears the floor). Few images make all models indistinguishable.
        losses: other quantities that are worse than the teacher's, their intervals apart: a distance alone misses a collapse.
    """

    cell: Cell
    n: int
    kind: Kind
    difference: float
    interval: tuple[float, float]
    ratio: float | None
    faster: float | None
    unit: float | None = None
    resolved: bool = True
    losses: tuple[str, ...] = ()

    @property
    def falls_short(self) -> bool:
        """Whether anything that was measured is worse than the teacher's beyond doubt."""
        return self.kind == "worse" or bool(self.losses)

    @property
    def as_good(self) -> bool:
        """Whether nothing is, though N images could have told."""
        return self.resolved and not self.falls_short

    def sentence(self, teacher: Cell) -> str:
        """For people."""
        who = f"the teacher at {_steps(teacher)}"
        if self.kind != "indistinguishable":
            said = f"distinguishable from {who} at N = {self.n:,} and {self.kind}: {self.span()}"
        elif self.resolved:
            said = f"indistinguishable from {who} at N = {self.n:,}: {self.span()}"
        else:
            said = f"N = {self.n:,} is too few images to tell it from {who}: {self.span()}"
        return f"{_steps(self.cell)} at guidance {self.cell.guidance:g}: {said}{self.aside()}"

    def aside(self) -> str:
        """What else there is to say: speed, and what the distance doesn't show."""
        speed = "" if self.faster is None else f", {_faster(self.faster)}"
        return speed + (f"; but {', '.join(self.losses)}" if self.losses else "")

    def span(self) -> str:
        """The difference and its interval, relative to the teacher's distance where the floor allows it."""
        (low, high), unit = self.interval, self.unit
        if unit is None:
            return f"distance {self.difference:+.3g} (95 % interval {low:+.3g} to {high:+.3g})"
        if self.difference / unit + 1 >= _LARGE:
            return (
                f"{self.difference / unit + 1:.3g} times the teacher's distance "
                f"(95 % interval {low / unit + 1:.3g} to {high / unit + 1:.3g})"
            )
        return f"distance {_percent(self.difference / unit)} (95 % interval {_percent(low / unit)} to {_percent(high / unit)})"


def _steps(cell: Cell) -> str:
    return f"{cell.steps} step{'s' * (cell.steps > 1)}"


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:+.1f} %" if abs(value) < 9.95 else f"{value:+,.0f} %"


def _faster(ratio: float) -> str:
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def verdicts(results: Results, n: int | None = None, model: str | None = None) -> list[Verdict]:
    """A verdict for each row of a model at n images (the most there are by default), in the table's order.

    Without a model those of all students; with "teacher" those of the teacher's other rows, which need no distillation.
    """
    if results.teacher is None:
        return []
    n = max((row.n for row in results.quality), default=0) if n is None else n
    rows = [row for row in results.quality if row.n == n and row.against is not None]
    wanted = [row for row in rows if (row.cell.model != TEACHER if model is None else row.cell.model == model)]
    return [_verdict(results, row) for row in wanted]


def _verdict(results: Results, row: Quality) -> Verdict:
    against = row.against
    if against is None or against.interval is None or results.teacher is None:
        raise ValueError(f"expected a difference with its interval for {row.cell}, got none; measure it again")
    low, high = against.interval
    kind: Kind = "indistinguishable" if low <= 0 <= high else "better" if high < 0 else "worse"
    teacher, floor = results.of(results.teacher, row.n), results.floor(row.n)
    ours, theirs = results.above_floor(row), None if teacher is None else results.above_floor(teacher)
    unit = None if ours is None else theirs
    own = None if teacher is None else teacher.distance
    matters = (own or 0.0) if floor is None else CLEAR * floor[1]
    return Verdict(
        cell=row.cell,
        n=row.n,
        kind=kind,
        difference=against.value,
        interval=against.interval,
        ratio=None if ours is None or theirs is None else ours / theirs,
        faster=faster(results, row.cell),
        unit=unit,
        resolved=kind != "indistinguishable" or high <= max(theirs or 0.0, matters),
        losses=() if teacher is None else _losses(row, teacher),
    )


def _losses(row: Quality, teacher: Quality) -> tuple[str, ...]:
    """What is worse than the teacher's beyond doubt, besides the distance; distances to the teacher's images always are."""
    return tuple(
        f"{quantity(key).label} {value.value:{quantity(key).form}}, not {teacher.values[key].value:{quantity(key).form}}"
        for key, value in row.values.items()
        if key != FD and not key.endswith("_to_teacher") and key in teacher.values
        if _apart(key, value, teacher.values[key])
    )


def _apart(key: str, value: Value, teacher: Value) -> bool:
    if value.interval is None or teacher.interval is None:
        return False
    above, below = value.interval[0] > teacher.interval[1], value.interval[1] < teacher.interval[0]
    return {"lower": above, "higher": below, "neither": above or below}[quantity(key).better]


def faster(results: Results, cell: Cell, batch_size: int = 1) -> float | None:
    """Median seconds an image of the teacher as it is meant, over those of a cell; None without both."""
    took = {s.cell: s.image["p50"] for s in results.speed if s.batch_size == batch_size}
    if results.teacher not in took or cell not in took:
        return None
    return took[results.teacher] / took[cell]


def enough(results: Results, n: int | None = None, model: str | None = None) -> Verdict | None:
    """The fewest steps at which a model (any student by default) is as good as its teacher; None where there are none.

    As good: indistinguishable at a number of images that could have told, or better, and in no other quantity worse. Of several
    at the same number of steps the first in the table is given, as none of them is ranked.
    """
    return _enough(verdicts(results, n, model))


def _enough(found: Iterable[Verdict]) -> Verdict | None:
    return min((v for v in found if v.as_good), key=lambda v: v.cell.steps, default=None)


@dataclass(frozen=True)
class Answer:
    """How many steps one model needs.

    Attributes:
        model: a student, or the teacher, which is undistilled.
        short: the answer, in as few words as can be.
        text: a sentence that holds what the answer rests on.
        enough: the fewest steps that are, if any.
        verdicts: on all of its numbers of steps.
    """

    model: str
    short: str
    text: str
    enough: Verdict | None
    verdicts: tuple[Verdict, ...]

    @property
    def name(self) -> str:
        """The model, for people."""
        return f"{self.model}, undistilled" if self.model == TEACHER else self.model

    @property
    def headline(self) -> str:
        """Name and sentence."""
        return f"{self.name}: {self.text}"


def answers(results: Results, n: int | None = None) -> list[Answer]:
    """An answer for each student in the table's order, then one for the teacher at fewer steps, where there are such rows."""
    models = list(dict.fromkeys(row.cell.model for row in results.quality if row.cell.model != TEACHER))
    return [answer for model in [*models, TEACHER] if (answer := _answer(results, n, model)) is not None]


def _answer(results: Results, n: int | None, model: str) -> Answer | None:
    teacher = results.teacher
    if teacher is None:
        return None
    found = [v for v in verdicts(results, n, model) if model != TEACHER or v.cell.steps < teacher.steps]
    if not found:
        return None
    best, size, than = _enough(found), f"N = {found[0].n:,}", f"the teacher at {_steps(teacher)}"
    worse = [v.cell.steps for v in found if v.falls_short]
    if best is not None:
        said = "indistinguishable from" if best.kind == "indistinguishable" else "better than"
        others = _counts(steps for steps in worse if steps != best.cell.steps)
        text = f"{_steps(best.cell)} at guidance {best.cell.guidance:g}: {said} {than} at {size}: {best.span()}{best.aside()}"
        return Answer(
            model, _steps(best.cell), f"{text}; {others} distinguishable" if others else text, best, tuple(found)
        )
    if len(worse) == len(found):
        near = min(found, key=lambda v: v.difference)
        text = (
            f"distinguishable from {than} at {size}, and worse: {_counts(worse)}; the nearest is {_steps(near.cell)} at "
            f"guidance {near.cell.guidance:g}: {near.span()}{near.aside()}"
        )
        return Answer(model, f"not at {_counts(worse).replace(' and ', ' or ')}", text, None, tuple(found))
    return Answer(model, "too few images to say", f"{size} is too few images to say", None, tuple(found))


def _counts(steps: Iterable[int]) -> str:
    """E.g. "1 and 2 steps"; "" for none."""
    *most, last = [str(s) for s in sorted(set(steps))] or [""]
    return f"{', '.join(most)}{' and ' * bool(most)}{last} step{'s' * (last != '1')}" if last else ""


def floor_sentence(results: Results, n: int) -> str:
    """What the distances stand on."""
    floor = results.floor(n)
    if floor is None:
        return f"No floor was measured at N = {n:,}, so no ratios are stated: real images don't score 0 against each other."
    return f"The floor: {n:,} real images score {floor[0]:.3g}, with a standard deviation of {floor[1]:.2g}."
