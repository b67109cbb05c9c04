"""What a comparison of language models or of classifiers measured, as data and as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .environment import environment
from .quantities import Quantity
from .rows import TEACHER, Value
from .table import aligned, escaped

SCHEMA = 1


@dataclass(frozen=True)
class ModelRow:
    """One model.

    Attributes:
        name: "teacher", or of its folder.
        path: folder or hub id, as given.
        architecture: its class.
        parameters: tied ones once.
        bytes: of those, in the dtype that they were measured in.
        weights: 16 hex digits over them.
        values: key of a quantity -> its value; what is held against the teacher is missing in the teacher's own row.
        seconds: what was timed -> seconds of each call, in the order in which they were taken, in turns with the other models'.
    """

    name: str
    path: str
    architecture: str
    parameters: int
    bytes: int
    weights: str
    values: dict[str, Value]
    seconds: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Found:
    """What one kind of model has to say.

    Attributes:
        columns: quantities in the order of the table; the first is the quality, the last how many times faster.
        values: model -> key -> value.
        seconds: model -> what was timed -> seconds.
        protocol: how.
        against: key of the quality held against the teacher's, and the words of a sentence around it, {} for the value.
    """

    columns: tuple[Quantity, ...]
    values: dict[str, dict[str, Value]]
    seconds: dict[str, dict[str, tuple[float, ...]]]
    protocol: dict[str, Any]
    against: tuple[str, str]


@dataclass
class ModelResults:
    """All of a comparison.

    Attributes:
        kind: of all models.
        rows: the teacher, then its students in the order given.
        columns: quantities in the order of the table.
        against: as in :class:`Found`.
        protocol: how it was measured.
        environment: of the machine that measured it.
    """

    kind: str
    rows: list[ModelRow]
    columns: tuple[Quantity, ...]
    against: tuple[str, str]
    protocol: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=environment)

    def to_json(self) -> str:
        """The file's text; ValueError for nan or inf, which JSON doesn't have."""
        data = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=True) + "\n"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(heads, rows of cells) as plain text."""
        shown = self._shown()
        heads = ["model", "parameters", "MB", *(column.label for column in shown)]
        rows = []
        for row in self.rows:
            cells = [spelled(column, row.values.get(column.key)) for column in shown]
            rows.append([row.name, f"{row.parameters:,}", f"{row.bytes / 1e6:,.3g}", *cells])
        return heads, rows

    def _shown(self) -> list[Quantity]:
        return [column for column in self.columns if any(column.key in row.values for row in self.rows)]

    def legend(self) -> list[str]:
        """What one has to know to read the table, a sentence a line."""
        facts = {"accelerator": "accelerator", "threads": "CPU threads", "torch": "torch"}
        machine = ", ".join(f"{label} {self.environment[key]}" for key, label in facts.items())
        notes = [f"{q.label}: {q.note}." for q in self._shown() if q.note]
        return ["Brackets: 95 % intervals.", *notes, f"Measured in {self.protocol['dtype']} on: {machine}."]

    def headlines(self) -> list[str]:
        """A sentence on each student: how good, how large and how fast it is beside its teacher."""
        teacher, *students = self.rows
        key, words = self.against
        by_key = {column.key: column for column in self.columns}
        said = []
        for row in students:
            size = f"{row.parameters / teacher.parameters:.3g} x its parameters"
            line = f"{row.name}: {words.format(spelled(by_key[key], row.values[key]))}, {size}"
            if (fast := self.columns[-1]).key in row.values:
                line += f", {spelled(fast, row.values[fast.key])} x as fast"
            said.append(f"{line}.")
        return said

    def markdown(self) -> str:
        """The table with padded cells, and under it what one has to know to read it."""
        heads, rows = self.table()
        lines = [f"- {escaped(line)}" for line in [*self.headlines(), *self.legend()]]
        return "\n".join([*aligned(heads, [[escaped(cell) for cell in row] for row in rows]), "", *lines]) + "\n"

    def to_csv(self) -> str:
        """One line a model, every quantity with the ends of its interval."""
        keys = [column.key for column in self._shown()]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        heads = [name for key in keys for name in (key, f"{key}_low", f"{key}_high")]
        writer.writerow(["model", "path", "parameters", "bytes", *heads])
        for row in self.rows:
            cells: list[object] = [row.name, row.path, row.parameters, row.bytes]
            for key in keys:
                value = row.values.get(key)
                cells += ["", "", ""] if value is None else [value.value, *(value.interval or ("", ""))]
            writer.writerow(cells)
        return out.getvalue()


def spelled(column: Quantity, value: Value | None) -> str:
    """A value with its interval; "" for none."""
    if value is None:
        return ""
    if value.interval is None:
        return f"{value.value:{column.form}}"
    low, high = value.interval
    return f"{value.value:{column.form}} [{low:{column.form}}, {high:{column.form}}]"


def teacher_first(names: Sequence[str]) -> tuple[str, list[str]]:
    """(the teacher's name, the students'); ValueError where the first is another."""
    first, *others = names
    if first != TEACHER:
        raise ValueError(f"expected {TEACHER} first, got {first}")
    return first, others
