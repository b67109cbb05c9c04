"""What a step of each classic-distillation method costs over its bare network calls: writes benchmarks/results/kd_step.json.

Ours: the batch, the method's loss with all that it writes, backward, AdamW, what comes after a step. Theirs: the calls that any
implementation makes, by stock Transformers and nothing else. Where text is written, as many cached forwards of one token of
those that write it, and the likeliest token each time; the teacher's forward without gradient, the student's, backward from
gradients that are there beforehand, AdamW. The same layouts, weights and shapes, in turns step by step, on one thread, CPU
seconds. Before it counts, each case looks whether both sides called their networks on the same shapes, as often.
python benchmarks/kd_step.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from kd_step_setting import RESNETS, SAMPLES, SPECIAL, Setting
from kd_step_sides import CASES, LEARNING_RATE, Bare, Case, Ours, Seen, watched
from step_cost import WARMUP, Row, compare

from stepdistill.bench.environment import environment
from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

WHAT = "ours / bare calls"
RECIPES = tuple(dict.fromkeys(case.recipe for case in CASES))


@dataclass
class Benchmark:
    """The cost of a step of distillation.

    Attributes:
        recipes: whose methods.
        vocabulary: entries of the text models' tables.
        batch: texts a step.
        block: tokens of a text.
        prompt: tokens of a prompt, where text is written.
        new: tokens that are written after it.
        teacher: layers and width of the text models.
        student: the same.
        images: a step.
        resolution: side of the images.
        steps: of each side, the first of which are not counted.
        seed: of weights, data and what is written.
        output: the results file.
    """

    recipes: CommaList = CommaList(RECIPES)  # noqa: RUF009  # immutable
    vocabulary: int = 8192
    batch: int = 4
    block: int = 128
    prompt: int = 32
    new: int = 32
    teacher: CommaList = CommaList(("6", "256"))  # noqa: RUF009
    student: CommaList = CommaList(("3", "128"))  # noqa: RUF009
    images: int = 32
    resolution: int = 64
    steps: int = 33
    seed: int = 0
    output: str = str(Path(__file__).parent / "results" / "kd_step.json")

    def __post_init__(self) -> None:
        if not self.recipes or (odd := sorted(set(self.recipes) - set(RECIPES))):
            raise InputError(
                f"expected some of {', '.join(RECIPES)}, got {', '.join(odd) if self.recipes else 'none'}; fix --recipes"
            )
        for name in ("teacher", "student"):
            if len(shape := vars(self)[name].ints()) != 2 or min(shape) < 1:
                raise InputError(f"expected layers and width, got {','.join(vars(self)[name])!r}; fix --{name}")
        if min(self.batch, self.prompt, self.new, self.images) < 1 or self.vocabulary < SPECIAL + 2:
            raise InputError(
                f"expected --batch, --prompt, --new and --images of at least 1 and a --vocabulary of {SPECIAL + 2}, got {self}"
            )
        if max(self.batch, self.images) > SAMPLES or self.block <= max(self.prompt, 2) or self.resolution < 8:
            raise InputError(
                f"expected up to {SAMPLES} samples a step (--batch, --images), a --block of more than its --prompt and 2 "
                f"tokens and a --resolution of at least 8, got {self}"
            )
        if self.steps <= WARMUP:
            raise InputError(f"expected steps > {WARMUP}, got {self.steps}; fix --steps")

    def setting(self) -> Setting:
        """The sizes."""
        (deep, wide), (layers, width) = self.teacher.ints(), self.student.ints()
        return Setting(
            self.vocabulary, self.batch, self.block, self.prompt, self.new, (deep, wide), (layers, width), self.images,
            self.resolution, self.seed,
        )  # fmt: skip


def same_work(name: str, ours: Seen, bare: Seen) -> dict[str, dict[str, int]]:
    """How often each network was called and how many tokens (or images) it saw; RuntimeError where the sides differ."""
    if ours != bare:
        raise RuntimeError(f"{name}: expected calls on the same shapes on both sides, got {ours} and {bare}")
    return {
        role: {"calls": len(shapes), "items": sum(prod(shape[:2]) if len(shape) == 2 else shape[0] for shape in shapes)}
        for role, shapes in ours.items()
    }


def turns(sides: tuple[Ours, Bare], steps: int) -> tuple[tuple[list[float], list[float]], tuple[Seen, Seen]]:
    """(seconds of counted steps of each side, what each called in the step before those)."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(WARMUP - 1):
        for side in sides:
            side.step(number)
    seen = []
    for side in sides:
        with watched(side.models) as found:
            side.step(WARMUP - 1)
        seen.append(found)
    for number in range(WARMUP, steps):
        for side, values in zip(sides, seconds, strict=True):
            values.append(side.step(number))
    return seconds, (seen[0], seen[1])


def measure(options: Benchmark) -> Iterator[tuple[Row, Case, dict[str, Any]]]:
    """All rows, each with its case and what :func:`same_work` says."""
    for case in (c for c in CASES if c.recipe in options.recipes):
        seconds, seen = turns(case.sides(options.setting()), options.steps)
        work = same_work(case.name, *seen)
        yield compare(WHAT, case.name, "CPU time", seconds, options.seed), case, work


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    options = parsed.recipe
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    asked = {name: value for name, value in asdict(options).items() if name != "output"}
    fixed = {"resnets": RESNETS, "optimizer": f"AdamW, {LEARNING_RATE:g}", "warmup": WARMUP, "threads": 1}
    about = {"protocol": {**asked, **fixed, "dtype": "float32"}, "environment": environment()}
    for row, case, found in measure(options):
        rows.append({**asdict(row), "recipe": case.recipe, "kind": case.what, "found": found})
        text = json.dumps({**about, "rows": rows}, indent=1, allow_nan=False)
        Path(options.output).write_text(text + "\n", encoding="utf-8")
        print(f"{row.what}, {row.network}: {row.ratio:.3f}, interval {row.interval}, seconds {row.values}", flush=True)
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
