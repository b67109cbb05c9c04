"""Quality and speed of the demo teacher at many and at few steps: writes benchmarks/results/demo_teacher.json.

Run it after the teacher or the judge was made again: python benchmarks/demo_teacher.py
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from stepdistill.config import CommaList, Parsed, run

FEW = 8


@dataclass
class Benchmark:
    """The demo teacher's rows.

    Attributes:
        teacher: a Diffusers folder, or "demo" for the one that ships.
        judge: folder of the judge; the one that ships by default.
        steps: numbers of denoising steps.
        guidance: guidance scale of the teacher.
        n: images a configuration.
        seed: of the noise.
        output: the results file.
    """

    teacher: str = "demo"
    judge: str | None = None
    steps: CommaList = field(default_factory=lambda: CommaList.parse("50,8,4,2,1"))
    guidance: float = 2.5
    n: int = 640
    seed: int = 0
    output: str = str(Path(__file__).parent / "results" / "demo_teacher.json")


def main(parsed: Parsed[Benchmark]) -> None:
    """Loads, measures, writes, prints."""
    from diffusers import StableDiffusionPipeline

    from stepdistill.bench.demo import evaluate_teacher
    from stepdistill.bench.judge import Judge
    from stepdistill.families.loading import DEMO_JUDGE, resolve

    options = parsed.recipe
    folder = resolve(options.teacher)
    judge = Judge.load(DEMO_JUDGE if options.judge is None else options.judge)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True)
    results = evaluate_teacher(pipe, judge, options.steps.ints(), options.n, options.seed, options.guidance)
    # at few steps guidance hurts, so what the teacher can do without it belongs in the table
    if options.guidance != 1.0:
        few = [k for k in options.steps.ints() if k <= FEW]
        bare = evaluate_teacher(pipe, judge, few, options.n, options.seed, guidance=1.0)
        rows = [*results.rows, *(replace(row, model="teacher, unguided") for row in bare.rows)]
        results = replace(results, rows=rows)
    results.write(options.output)
    print(f"\n{results.markdown()}\nwritten to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
