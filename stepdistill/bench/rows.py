"""What a sweep measured, as data: quality of each cell, its speed, and the protocol without which the numbers say nothing.

A cell is model x steps x guidance: what images are made by. Quality is by cell and number of images, speed by cell and batch
size. Both travel with their protocol (prompts, seeds, features, what real images score) and the machine they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .environment import environment
from .latency import summary
from .metrics import is_clear

SCHEMA = 3
TEACHER = "teacher"
FD = "fd"
_WIDTH = 2 * 1.96  # of a normal 95 % interval, in standard deviations
_NUMBERS = re.compile(
    r"\[\n[\s\d.,eE+-]+\]"
)  # a list of nothing else, which goes on one line; strings hold no raw newline
_UNSAFE = re.compile(r"[^\w.+-]")  # in file names


@dataclass(frozen=True, order=True)
class Cell:
    """What images are made by.

    Attributes:
        model: "teacher", or a student's name.
        steps: denoising steps asked for.
        guidance: guidance scale, as the pipeline reads it.
    """

    model: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.model}, {self.steps} step{'s' * (self.steps > 1)}, guidance {self.guidance:g}"

    @property
    def slug(self) -> str:
        """A file name, e.g. teacher-50-2.5; one of its own for every cell, whatever the model is called."""
        name = _UNSAFE.sub("_", self.model)
        if name != self.model or name.startswith("."):  # "a b" and "a_b" are two models
            name = f"{name.lstrip('.')}~{hashlib.sha256(self.model.encode('utf-8', 'replace')).hexdigest()[:6]}"
        return f"{name}-{self.steps}-{self.guidance:g}"


@dataclass(frozen=True)
class Value:
    """A number and its 95 % bootstrap interval, where it has one."""

    value: float
    interval: tuple[float, float] | None = None

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Value:
        """From JSON."""
        return cls(data["value"], None if data["interval"] is None else (data["interval"][0], data["interval"][1]))


@dataclass(frozen=True)
class Quality:
    """What the first n images of a cell score.

    Attributes:
        cell: what made them.
        n: images.
        evaluations: network evaluations an image, counted; guidance makes two a step.
        values: key of a quantity -> its value.
        against: difference of the Frechet distance to that of the teacher at its own steps and guidance, with the interval of a
            bootstrap that draws the same prompts for both; None for that row itself, and where there is none.
    """

    cell: Cell
    n: int
    evaluations: float
    values: dict[str, Value]
    against: Value | None = None

    @property
    def distance(self) -> float | None:
        """The Frechet distance, if it was measured."""
        return self.values[FD].value if FD in self.values else None

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Quality:
        """From JSON."""
        values = {key: Value.read(value) for key, value in data["values"].items()}
        against = None if data["against"] is None else Value.read(data["against"])
        return cls(Cell(**data["cell"]), data["n"], data["evaluations"], values, against)


@dataclass(frozen=True)
class Speed:
    """How long a cell takes for a batch.

    Attributes:
        cell: what was timed.
        batch_size: prompts a call.
        seconds: of each call, in the order taken; all cells of a batch size took turns.
        stages: text, denoiser, decode, rest -> seconds of separate calls, which waited for the device between the stages.
        evaluations: network evaluations an image.
        first_call: seconds of the very first call of this cell, warm-up and compilation in it.
        peak_memory: bytes, None where it could not be measured.
    """

    cell: Cell
    batch_size: int
    seconds: tuple[float, ...]
    stages: dict[str, tuple[float, ...]]
    evaluations: float
    first_call: float | None = None
    peak_memory: int | None = None

    @property
    def image(self) -> dict[str, float]:
        """p50, p90 and p99 of the seconds an image."""
        return {name: value / self.batch_size for name, value in summary(self.seconds).items()}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Speed:
        """From JSON."""
        stages = {name: tuple(values) for name, values in data["stages"].items()}
        known = {**data, "cell": Cell(**data["cell"]), "seconds": tuple(data["seconds"]), "stages": stages}
        return cls(**known)


@dataclass
class Results:
    """All of a sweep.

    Attributes:
        quality: in the order of the table.
        speed: in the same order, by batch size.
        protocol: at least `features` ({name, hash, dim}), `seeds`, `prompts` ({source, count, hash}), `reference` ({source,
            count}) and, where it was measured, `real` (number of images, as a string -> key -> what so many real images score,
            as values).
        teacher: the teacher at the steps and guidance that it is meant for, which students are held against.
        samples: slug of a cell -> key -> one number an image, in the order of the prompts.
        environment: of the machine that made it.
        notes: sentences printed under the table.
    """

    quality: list[Quality]
    protocol: dict[str, Any]
    speed: list[Speed] = field(default_factory=list)
    teacher: Cell | None = None
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=environment)
    notes: list[str] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the protocol that must be equal for numbers to compare.

        Without `real`, which is measured and differs between machines in its last digits, and without where a thing with a
        hash came from.
        """
        rest = {key: value for key, value in self.protocol.items() if key != "real"}
        for key, value in rest.items():
            if isinstance(value, Mapping) and "hash" in value:
                rest[key] = {name: fact for name, fact in value.items() if name != "source"}
        return rest

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the protocol's identity: numbers of another one don't compare."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The file's text; ValueError for nan or inf, which JSON doesn't have."""
        data = {"schema": SCHEMA, "fingerprint": self.fingerprint, **asdict(self)}
        text = json.dumps(data, indent=1, allow_nan=False)
        return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"

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
            kind, found = data.pop("kind", None), data.pop("schema")
            data.pop("fingerprint", None)
        except FileNotFoundError as error:
            raise InputError(
                f"expected a results file, got nothing at {path}; run the benchmark that writes it"
            ) from error
        except OSError as error:
            raise InputError(
                f"expected a results file, got {path} ({error.strerror}); give its results.json"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"expected a results file with a schema number, got {path}; write it again") from error
        if kind is not None:
            raise InputError(
                f"expected results of a sweep of diffusion pipelines, got those of {kind}s in {path}; read its results.md"
            )
        if found != SCHEMA:
            raise InputError(f"expected results of schema {SCHEMA}, got {found} in {path}; write them again")
        try:
            quality = [Quality.read(row) for row in data.pop("quality")]
            speed = [Speed.read(row) for row in data.pop("speed")]
            teacher = data.pop("teacher")
            return cls(quality, speed=speed, teacher=None if teacher is None else Cell(**teacher), **data)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"expected the fields of schema {SCHEMA}, got others in {path} ({error}); write it again"
            ) from error

    def of(self, cell: Cell, n: int) -> Quality | None:
        """The quality of a cell at a number of images."""
        return next((row for row in self.quality if row.cell == cell and row.n == n), None)

    def real(self, n: int, key: str) -> Value | None:
        """What n real images score, if it was measured."""
        found = self.protocol.get("real", {}).get(str(n), {}).get(key)
        return None if found is None else Value.read(found)

    def floor(self, n: int) -> tuple[float, float] | None:
        """The Frechet distance of n real images, and its standard deviation by bootstrap, if it was measured."""
        real = self.real(n, FD)
        if real is None or real.interval is None:
            return None
        return real.value, (real.interval[1] - real.interval[0]) / _WIDTH

    def best(self, n: int, steps: int | None = None) -> Quality | None:
        """The teacher's row of the lowest distance, whatever its guidance: of all, or at one number of steps."""
        rows = [r for r in self.quality if r.cell.model == TEACHER and r.n == n and steps in (None, r.cell.steps)]
        return min((r for r in rows if FD in r.values), key=lambda r: r.values[FD].value, default=None)

    def above_floor(self, row: Quality) -> float | None:
        """A row's distance less the floor; None if it does not clear the floor, or one of them was not measured.

        To clear the floor is to lie above it by 5 times its standard deviation.
        """
        floor, distance = self.floor(row.n), row.distance
        if floor is None or distance is None or distance <= floor[0] or not is_clear(distance, *floor):
            return None
        return distance - floor[0]

    def times_best(self, row: Quality) -> float | None:
        """A row's distance over the teacher's lowest, both less the floor; None if either does not clear the floor."""
        best = self.best(row.n)
        ours, theirs = self.above_floor(row), None if best is None else self.above_floor(best)
        return None if ours is None or theirs is None else ours / theirs

    def gap_closed(self, row: Quality) -> float | None:
        """Which share of the way from the teacher at the same steps to the teacher's best a row has gone; 1 is all of it.

        Both ends are the teacher's lowest distances over all guidances. None for the teacher itself, and where the two ends are
        not 5 standard deviations of the floor apart.
        """
        same, best, floor = self.best(row.n, row.cell.steps), self.best(row.n), self.floor(row.n)
        if row.cell.model == TEACHER or same is None or best is None or floor is None or row.distance is None:
            return None
        high, low = same.values[FD].value, best.values[FD].value
        return (high - row.distance) / (high - low) if high > low and is_clear(high, low, floor[1]) else None
