"""Quality and speed of the demo teacher at many and at few steps: writes benchmarks/results/demo_teacher.json.

Beside it come the statistics of the real images that every row is compared with (demo_reference.safetensors). Run it after
the teacher or the judge was made again: python benchmarks/demo_teacher.py. Rows of the same protocol that are there already
stay, so it goes on where it stopped, and other steps or guidances can be added.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.bench.judge import Judge
    from stepdistill.bench.reference import Reference
    from stepdistill.bench.rows import Quality

RESULTS = Path(__file__).parent / "results"


@dataclass
class Benchmark:
    """The demo teacher's rows.

    Attributes:
        teacher: a Diffusers folder, or "demo" for the one that ships.
        judge: folder of the judge; the one that ships by default.
        steps: numbers of denoising steps.
        guidance: guidance scales, as Diffusers counts them.
        n: numbers of images of which rows are made; the smaller are the first of the largest.
        seed: of the noise.
        threads: CPU threads; 0 leaves PyTorch's own choice.
        real: how many real images the statistics are of, if they must be made.
        reference: file of the real images' statistics; measured and written where there is none for this judge.
        samples: folder of the images' numbers, from which a stopped row goes on.
        output: the results file.
    """

    teacher: str = "demo"
    judge: str | None = None
    steps: CommaList = field(default_factory=lambda: CommaList.parse("50,25,8,4,2,1"))
    guidance: CommaList = field(default_factory=lambda: CommaList.parse("1,1.5,2,3"))
    n: CommaList = field(default_factory=lambda: CommaList.parse("1200,5000"))
    seed: int = 0
    threads: int = 0
    real: int = 20_000
    reference: str = str(RESULTS / "demo_reference.safetensors")
    samples: str = str(RESULTS.parents[1] / "out" / "demo_teacher")
    output: str = str(RESULTS / "demo_teacher.json")


def main(parsed: Parsed[Benchmark]) -> None:
    """Loads, measures what is missing, writes after every row, prints."""
    import torch

    from stepdistill.bench.contenders import open_contenders
    from stepdistill.bench.demo import Entry, evaluate, seconds_note
    from stepdistill.bench.judge import Judge
    from stepdistill.bench.rows import TEACHER, Cell, Results
    from stepdistill.bench.speed import speeds
    from stepdistill.bench.table import markdown
    from stepdistill.bench.yardstick import demo_yardstick
    from stepdistill.families.loading import DEMO_JUDGE

    options = parsed.recipe
    if options.threads:
        torch.set_num_threads(options.threads)
    judge = Judge.load(DEMO_JUDGE if options.judge is None else options.judge)
    yardstick = demo_yardstick(judge, options.n.ints(), options.seed, reference_of(judge, options))
    (teacher,) = open_contenders(options.teacher, [])

    rows = kept(options.output, yardstick.protocol())
    for guidance, steps in itertools.product(options.guidance.floats(), options.steps.ints()):
        if Cell(TEACHER, steps, guidance) not in {row.cell for row in rows}:
            rows += evaluate([Entry(teacher, (steps,), guidance)], yardstick, options.samples)
            Results(rows, yardstick.protocol()).write(options.output)
    rows = sorted(rows, key=lambda r: (r.n, r.cell.guidance, -r.cell.steps))
    speed, _ = speeds([(cell, teacher) for cell in dict.fromkeys(row.cell for row in rows)], yardstick.plan)
    results = Results(rows, yardstick.protocol(), speed, notes=[seconds_note()])
    results.teacher = None if (best := results.best(yardstick.n)) is None else best.cell
    results.write(options.output)
    print(f"\n{markdown(results)}\nwritten to {options.output}")


def reference_of(judge: Judge, options: Benchmark) -> Reference:
    """The real images' statistics from their file; measured and written where there are none for this judge."""
    from stepdistill.bench.features import JudgeFeatures
    from stepdistill.bench.real import WorldImages
    from stepdistill.bench.reference import Reference

    try:
        return Reference.load(options.reference, JudgeFeatures(judge))
    except InputError as error:
        print(f"measuring real images: {error}")
    found = Reference.measure(JudgeFeatures(judge), WorldImages(options.real), judge.resolution)
    found.save(options.reference)
    return found


def kept(path: str, protocol: dict[str, Any]) -> list[Quality]:
    """The rows of an earlier run with the same protocol."""
    from stepdistill.bench.rows import Results

    try:
        earlier = Results.read(path)
    except InputError:
        return []
    return list(earlier.quality) if earlier.identity == Results([], protocol).identity else []


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
