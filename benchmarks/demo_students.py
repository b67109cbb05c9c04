"""A recipe's students of the demo teacher, at several training seeds, beside it: writes benchmarks/results/demo_RECIPE.json.

Runs the recipe with its demo settings once a seed, or goes on with runs that were stopped, or takes the results of finished
ones, and collects the students' rows under the teacher's lowest at each number of steps, whose seconds were taken in turns
with the last student's:

python benchmarks/demo_students.py                        # lcm_lora
python benchmarks/demo_students.py --recipe progressive
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Benchmark:
    """Students of the demo teacher.

    Attributes:
        recipe: in recipes/.
        settings: more of its flags, in one string.
        seeds: of the trainings.
        images: a row.
        threads: CPU threads; 0 leaves PyTorch's own choice.
        runs: folder of the run folders; out/demo_RECIPE by default.
        output: the results file; by default benchmarks/results/demo_RECIPE.json.
    """

    recipe: str = "lcm_lora"
    settings: str = ""
    seeds: CommaList = field(default_factory=lambda: CommaList.parse("0,1,2"))
    images: int = 5000
    threads: int = 0
    runs: str | None = None
    output: str | None = None


def command(options: Benchmark, folder: Path, seed: int) -> list[str]:
    """What trains and measures one student."""
    threads = options.threads
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(threads)] if threads else []
    flags = {
        "output_dir": folder,
        "train.seed": seed,
        "eval.images": options.images,
        "train.resume_from_checkpoint": "latest",
    }
    script = str(ROOT / "recipes" / f"{options.recipe}.py")
    return [*launch, script, *shlex.split(options.settings), *(f"--{name}={value}" for name, value in flags.items())]


def main(parsed: Parsed[Benchmark]) -> None:
    """Runs what is missing, collects, writes, prints."""
    from stepdistill.bench.demo import STUDENT
    from stepdistill.bench.rows import TEACHER, Quality, Results, Speed
    from stepdistill.bench.table import markdown

    options, students, speed = parsed.recipe, list[Quality](), list[Speed]()
    if not options.seeds:
        raise InputError("expected one seed or more, got none; fix --seeds, e.g. 0,1,2")
    runs = Path(options.runs or ROOT / "out" / f"demo_{options.recipe}")
    output = options.output or ROOT / "benchmarks" / "results" / f"demo_{options.recipe}.json"
    for seed in options.seeds.ints():
        folder = runs / str(seed)
        results = folder / "results.json"
        if not results.is_file():
            subprocess.run(command(options, folder, seed), check=True, cwd=ROOT)
        found = Results.read(results)
        if {(r.cell.model, r.n) for r in found.quality} != {(TEACHER, options.images), (STUDENT, options.images)}:
            raise InputError(
                f"expected rows of teacher and student of {options.images} images in {results}, got others; delete it and "
                "run again, after benchmarks/demo_teacher.py if it is the teacher's that are missing"
            )
        name = f"{STUDENT}, seed {seed}"
        students += [replace(r, cell=replace(r.cell, model=name)) for r in found.quality if r.cell.model == STUDENT]
        speed += [replace(s, cell=replace(s.cell, model=name)) for s in found.speed if s.cell.model == STUDENT]
    lowest = [
        found.best(options.images, steps) for steps in sorted({r.cell.steps for r in found.quality}, reverse=True)
    ]
    teachers = [row for row in lowest if row is not None]
    shown = [s for s in found.speed if s.cell in {row.cell for row in teachers}]
    notes = [f"{TEACHER}: of each number of steps the guidance of the lowest distance.", *found.notes]
    merged = Results(
        [*teachers, *students], found.protocol, [*shown, *speed], environment=found.environment, notes=notes
    )
    merged.teacher = None if (best := merged.best(options.images)) is None else best.cell
    merged.write(output)
    print(f"{markdown(merged)}\nwritten to {output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
