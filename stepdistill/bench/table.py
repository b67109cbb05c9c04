"""The table: rows of model x steps x guidance with everything needed to read them, as JSON and as Markdown.

A row without its protocol says nothing, so both travel together: which prompts, seeds and features, how many images, what real
images score at that number, and the machine that the seconds belong to.
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
from .metrics import CLEAR, is_clear

SCHEMA = 2
TEACHER = "teacher"
UNCLEAR = "unclear"
_WIDTH = 2 * 1.96  # of a normal 95 % interval, in standard deviations


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        model: "teacher", "student", ...
        steps: denoising steps asked for.
        guidance: guidance scale, as the pipeline reads it.
        frechet: distance to the reference images.
        interval: 95 % bootstrap interval of it.
        kid: kernel distance, unbiased: about 0 for real images.
        recall: share of real images that lie among these.
        diversity: mean distance of the features of two images of one caption.
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
    kid: float
    recall: float
    diversity: float
    accuracy: dict[str, float]
    accuracy_interval: tuple[float, float]
    seconds: tuple[float, ...]
    evaluations: float
    n: int

    @property
    def seconds_p50(self) -> float:
        """The median of `seconds`."""
        return summary(self.seconds)["p50"]

    @property
    def configuration(self) -> tuple[str, int, float]:
        """What images are made by: model, steps, guidance. Rows that differ in n alone share it."""
        return self.model, self.steps, self.guidance

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
        protocol: at least `features` ({name, hash}), `seeds` and `real` (number of images, as a string -> what so many real
            images score: frechet, which is the floor, interval, recall, diversity, accuracy); whatever else says how
            the numbers were made.
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

    def floor(self, n: int) -> tuple[float, float] | None:
        """The distance of n real images, and its standard deviation by bootstrap, if it was measured."""
        real = self.protocol["real"].get(str(n))
        return None if real is None else (real["frechet"], (real["interval"][1] - real["interval"][0]) / _WIDTH)

    def best(self, n: int, steps: int | None = None) -> Row | None:
        """The teacher's row of the lowest distance, whatever its guidance: of all, or at one number of steps."""
        rows = [r for r in self.rows if r.model == TEACHER and r.n == n and steps in (None, r.steps)]
        return min(rows, key=lambda r: r.frechet, default=None)

    def times_best(self, row: Row) -> float | None:
        """A row's distance over the teacher's lowest, both less the floor; None if either does not clear the floor.

        To clear the floor is to lie above it by 5 times its standard deviation.
        """
        best, floor = self.best(row.n), self.floor(row.n)
        if best is None or floor is None or not all(is_clear(r.frechet, *floor) for r in (row, best)):
            return None
        return (row.frechet - floor[0]) / (best.frechet - floor[0])

    def gap_closed(self, row: Row) -> float | None:
        """Which share of the way from the teacher at the same steps to the teacher's best a row has gone; 1 is all of it.

        Both ends are the teacher's lowest distances over all guidances. None for the teacher itself, and where the two ends are
        not 5 standard deviations of the floor apart.
        """
        same, best, floor = self.best(row.n, row.steps), self.best(row.n), self.floor(row.n)
        if row.model == TEACHER or same is None or best is None or floor is None:
            return None
        if not is_clear(same.frechet, best.frechet, floor[1]):
            return None
        return (same.frechet - row.frechet) / (same.frechet - best.frechet)

    def markdown(self) -> str:
        """The table with padded cells, which reads well as plain text too, and under it what one has to know to read it."""
        head = ["model", "steps", "guidance", "evaluations", "Frechet distance", "x teacher's best", "gap closed"]
        head += ["recall", "diversity", "all right", "lowest attribute", "s / image", "N"]
        return "\n".join([*aligned(head, [self._cells(row) for row in self.rows]), "", *self._legend()]) + "\n"

    def _cells(self, row: Row) -> list[str]:
        times, gap, (low, high) = self.times_best(row), self.gap_closed(row), row.accuracy_interval
        lowest = min((name for name in row.accuracy if name != "all"), key=lambda name: row.accuracy[name])
        return [
            row.model,
            str(row.steps),
            f"{row.guidance:g}",
            f"{row.evaluations:g}",
            f"{row.frechet:.3g} [{row.interval[0]:.3g}, {row.interval[1]:.3g}]",
            UNCLEAR if times is None else f"{times:.2f}",
            "" if gap is None else f"{gap:.0%}",
            f"{row.recall:.2f}",
            f"{row.diversity:.3g}",
            f"{row.accuracy['all']:.1%} [{low:.1%}, {high:.1%}]",
            f"{lowest} {row.accuracy[lowest]:.1%}",
            f"{row.seconds_p50:.3g}" if row.seconds else "",
            str(row.n),
        ]

    def _legend(self) -> list[str]:
        features = self.protocol["features"]
        used = {str(row.n) for row in self.rows}
        lines = [
            f"Frechet distance by {features['name']} ({features['hash']}), lower is better. Brackets: 95 % bootstrap."
        ]
        lines += [
            f"{n} real images of the same captions: distance {real['frechet']:.3g} (the floor), recall {real['recall']:.2f}, "
            f"diversity {real['diversity']:.3g}, {real['accuracy']['all']:.1%} all right."
            for n, real in self.protocol["real"].items()
            if n in used
        ]
        lines += [
            f"x teacher's best: distance less the floor, over the teacher's lowest at this N less the floor. {UNCLEAR}: "
            f"less than {CLEAR:g} standard deviations of the floor above it.",
            "Gap closed: which share of the way from the teacher's lowest distance at the same steps to its lowest of all.",
        ]
        return [f"- {line}" for line in [*lines, *self.notes]]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up; the first column is text, the others are numbers, to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return [line(head), line(rule), *(line(row) for row in rows)]
