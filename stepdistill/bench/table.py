"""The table: rows of model x steps x guidance with everything needed to read them, as JSON and as Markdown.

A row without its protocol says nothing, so both travel together: which prompts, seeds and features, how many images, the floor
at that number, and the machine that the seconds belong to.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .latency import summary
from .metrics import CLEAR, floor_corrected_ratio, is_clear

SCHEMA = 1
AT_THE_FLOOR = "near the floor"


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        model: "teacher", "student", ...
        steps: denoising steps asked for.
        guidance: guidance scale, as the pipeline reads it.
        frechet: distance to the reference images.
        interval: 95 % bootstrap interval of it.
        accuracy: attribute -> share of images that show what was asked for; "all" = every attribute.
        accuracy_interval: 95 % bootstrap interval of "all".
        seconds: per image, raw, one value a timed call.
        evaluations: network evaluations an image, counted; guidance makes two a step.
        n: images.
    """

    model: str
    steps: int
    guidance: float
    frechet: float
    interval: tuple[float, float]
    accuracy: dict[str, float]
    accuracy_interval: tuple[float, float]
    seconds: tuple[float, ...]
    evaluations: float
    n: int

    @property
    def seconds_p50(self) -> float:
        """The median of `seconds`."""
        return summary(self.seconds)["p50"]

    @classmethod
    def read(cls, data: dict[str, Any]) -> Row:
        """A row back from JSON."""
        lists = {name: tuple(data[name]) for name in ("interval", "accuracy_interval", "seconds")}
        return cls(**{**data, **lists})


def environment() -> dict[str, Any]:
    """What seconds and last digits depend on: versions, platform, threads, accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        **{name: _version(name) for name in ("torch", "diffusers", "transformers", "peft", "torchmetrics")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": str(accelerator or "none"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass
class Results:
    """Rows and what they mean.

    Attributes:
        rows: in the order of the table.
        protocol: at least `features` ({name, hash}), `floor` (number of images, as a string -> the distance of two real
            samples) and `seeds`; whatever else says how the numbers were made.
        environment: of the machine that made the rows.
        notes: sentences printed under the table.
    """

    rows: list[Row]
    protocol: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=environment)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The file's text; ValueError for nan or inf, which JSON doesn't have."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file; an older one is replaced whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """Results back from a file; InputError if it is missing, no results file, or of another schema."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            found = data.pop("schema")
        except FileNotFoundError as error:
            raise InputError(
                f"expected a results file, got nothing at {path}; run the benchmark that writes it"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"expected a results file with a schema number, got {path}; write it again") from error
        if found != SCHEMA:
            raise InputError(f"expected results of schema {SCHEMA}, got {found} in {path}; write them again")
        try:
            return cls(rows=[Row.read(row) for row in data.pop("rows")], **data)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"expected the fields of schema {SCHEMA}, got others in {path} ({error}); write it again"
            ) from error

    def floor(self, n: int) -> float | None:
        """The distance of two real samples at n images, if it was measured."""
        value = self.protocol["floor"].get(str(n))
        return None if value is None else float(value)

    def ratio(self, row: Row, baseline: str = "teacher") -> str:
        """A row's distance as a share of the baseline's at the same steps and number of images, both less the floor.

        "" where there is no such baseline; "near the floor" where either is within 5 floors, so that a ratio says nothing.
        """
        pairs = [r for r in self.rows if r.model == baseline and (r.steps, r.n) == (row.steps, row.n)]
        level = self.floor(row.n)
        if row.model == baseline or not pairs or level is None:
            return ""
        value = floor_corrected_ratio(row.frechet, pairs[0].frechet, level)
        return AT_THE_FLOOR if value is None else f"{value:.2f}"

    def markdown(self) -> str:
        """The table with padded cells, which reads well as plain text too, and under it what one has to know to read it."""
        attributes = [name for name in self.rows[0].accuracy if name != "all"] if self.rows else []
        head = ["model", "steps", "guidance", "evaluations", "Frechet distance", "vs teacher, same steps", "all right"]
        cells = [self._cells(row, attributes) for row in self.rows]
        return "\n".join([*aligned([*head, *attributes, "s / image", "N"], cells), "", *self._legend()]) + "\n"

    def _cells(self, row: Row, attributes: Sequence[str]) -> list[str]:
        level = self.floor(row.n)
        mark = "" if level is None or is_clear(row.frechet, level) else " *"
        low, high = row.accuracy_interval
        return [
            row.model,
            str(row.steps),
            f"{row.guidance:g}",
            f"{row.evaluations:g}",
            f"{row.frechet:.3g} [{row.interval[0]:.3g}, {row.interval[1]:.3g}]{mark}",
            self.ratio(row),
            f"{row.accuracy['all']:.1%} [{low:.1%}, {high:.1%}]",
            *(f"{row.accuracy[name]:.1%}" for name in attributes),
            f"{row.seconds_p50:.3g}",
            str(row.n),
        ]

    def _legend(self) -> list[str]:
        floors = ", ".join(f"{value:.3g} at N = {n}" for n, value in self.protocol["floor"].items())
        features = self.protocol["features"]
        lines = [
            f"Frechet distance by {features['name']} ({features['hash']}), lower is better. Brackets: 95 % bootstrap.",
            f"Floor (two samples of real images): {floors}. Ratios are less the floor and stated past {CLEAR:g} floors only.",
        ]
        if any((level := self.floor(row.n)) is not None and not is_clear(row.frechet, level) for row in self.rows):
            lines.append(f"* within {CLEAR:g} floors: too near to them for a ratio; go by the intervals.")
        return [f"- {line}" for line in [*lines, *self.notes]]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up; the first column is text, the others are numbers, to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return [line(head), line(rule), *(line(row) for row in rows)]
