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
    from stepdistill.bench.table import Row

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
    output: str = str(RESULTS / "demo_teacher.json")


def main(parsed: Parsed[Benchmark]) -> None:
    """Loads, measures what is missing, writes after every row, prints."""
    import torch
    from diffusers import StableDiffusionPipeline

    from stepdistill.bench.demo import REPEATS, evaluate, seconds_note, timed
    from stepdistill.bench.features import JudgeFeatures
    from stepdistill.bench.judge import Judge
    from stepdistill.bench.reference import Reference
    from stepdistill.bench.table import TEACHER, Results
    from stepdistill.bench.yardstick import Yardstick
    from stepdistill.families.loading import DEMO_JUDGE, resolve

    options = parsed.recipe
    if options.threads:
        torch.set_num_threads(options.threads)
    judge = Judge.load(DEMO_JUDGE if options.judge is None else options.judge)
    try:
        reference = Reference.load(options.reference, JudgeFeatures(judge))
    except InputError as error:
        print(f"measuring real images: {error}")
        reference = Reference.measure(JudgeFeatures(judge), judge.resolution, options.real)
        reference.save(options.reference)
    yardstick = Yardstick(judge, options.n.ints(), options.seed, reference)
    pipe = StableDiffusionPipeline.from_pretrained(resolve(options.teacher), safety_checker=None, use_safetensors=True)

    rows = kept(options.output, yardstick.protocol())
    for guidance, steps in itertools.product(options.guidance.floats(), options.steps.ints()):
        if (TEACHER, steps, guidance) not in {row.configuration for row in rows}:
            rows += evaluate(pipe, yardstick, TEACHER, (steps,), guidance)
            Results(rows, yardstick.protocol()).write(options.output)
    rows = sorted(rows, key=lambda r: (r.n, r.guidance, -r.steps))
    rows = timed(rows, {TEACHER: pipe}, yardstick.prompts[0], REPEATS)
    results = Results(rows, yardstick.protocol(), notes=[seconds_note()])
    results.write(options.output)
    print(f"\n{results.markdown()}\nwritten to {options.output}")


def kept(path: str, protocol: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same protocol."""
    from stepdistill.bench.table import Results

    try:
        earlier = Results.read(path)
    except InputError:
        return []
    return list(earlier.rows) if earlier.protocol == protocol else []


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
