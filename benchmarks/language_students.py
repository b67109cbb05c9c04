"""Students of one language model by several settings and seeds, a control beside each seed: benchmarks/results/RECIPE.json.

Trains the recipe's demo teacher once and saves it, a control group once a seed (the same student, batches and steps, without a
teacher), and runs the recipe once a setting and seed, all with the demo's options. What is finished is not done again, what was
stopped goes on:

python benchmarks/language_students.py
python benchmarks/language_students.py --variants "jsd:--method.divergence.kind=jsd;skew:--method.divergence.kind=skew_kl"
python benchmarks/language_students.py --recipe gkd --teacher out/lm_kd_seeds/teacher/model    # learn from one teacher
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from language_groups import CONTROL, FOUND, before_distillation, train_control, train_teacher
from seed_spread import paired, spread

from stepdistill.config import CommaList, Parsed, parse, run
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FACTS, CONFIG = "stepdistill.json", "config.yaml"
FREE = ("output_dir", "control", "teacher.path", "train.resume_from_checkpoint")  # say where, not what
NOT_THE_TEACHERS = (*FREE, "method.", "eval.", "student.")


@dataclass
class Benchmark:
    """Language models.

    Attributes:
        recipe: in recipes/, with a demo in recipes/configs/.
        variants: `name:flags`, separated by semicolons; flags of --method alone, since the control has no others.
        settings: more of the recipe's flags, for all: teacher, control and students.
        seeds: of the students.
        teacher: a checkpoint to learn from, as it is; by default a demo, trained by the demo's options into RUNS/teacher/model.
        runs: folder of the run folders; out/RECIPE_seeds by default.
        output: the results file; benchmarks/results/RECIPE.json by default.
    """

    recipe: str = "lm_kd"
    variants: str = "student:"
    settings: str = ""
    seeds: CommaList = field(default_factory=lambda: CommaList.parse("0,1,2"))
    teacher: str | None = None
    runs: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.seeds.ints())) != len(self.seeds) or not self.seeds:
            raise InputError(f"expected seeds, each once, got {','.join(self.seeds)!r}; fix --seeds, e.g. 0,1,2")
        if not (self.demo.is_file() and self.script.is_file()):
            raise InputError(f"expected a recipe with a demo in {self.demo.parent}, got {self.recipe!r}; fix --recipe")
        self.flags()

    @property
    def demo(self) -> Path:
        """The recipe's demo options."""
        return ROOT / "recipes" / "configs" / f"{self.recipe}_demo.yaml"

    @property
    def script(self) -> Path:
        """The recipe."""
        return ROOT / "recipes" / f"{self.recipe}.py"

    @property
    def folder(self) -> Path:
        """Where the runs are."""
        return Path(self.runs or ROOT / "out" / f"{self.recipe}_seeds")

    @property
    def checkpoint(self) -> Path | str:
        """The teacher."""
        return self.teacher or self.folder / "teacher" / "model"

    def flags(self) -> dict[str, list[str]]:
        """Name -> flags, of each variant."""
        found: dict[str, list[str]] = {}
        for part in filter(None, (p.strip() for p in self.variants.split(";"))):
            name, _, flags = part.partition(":")
            if not name.replace("_", "").replace("-", "").isalnum() or name in (CONTROL, "teacher", *found):
                raise InputError(
                    f"expected names of their own for variants, of letters, digits, _ and -, got {name!r}; fix --variants"
                )
            found[name] = shlex.split(flags)
        if not found:
            raise InputError(f"expected name:flags;name:flags, got {self.variants!r}; fix --variants")
        return found


def command(options: Benchmark, folder: Path, seed: int, flags: list[str]) -> list[str]:
    """What trains and measures one student, without a control."""
    teacher = [f"--teacher.path={options.checkpoint}", "--teacher.fit_steps=0"]  # it is ready, whatever a demo asks for
    return [sys.executable, str(options.script), *words(options, folder, seed, flags), *teacher, "--control=false"]


def words(options: Benchmark, folder: Path, seed: int, flags: Sequence[str] = ()) -> list[str]:
    """The demo's options, the settings for all, `flags`, and what is a run's own."""
    own = [f"--output_dir={folder}", f"--train.seed={seed}", "--train.resume_from_checkpoint=latest"]
    return ["--config", str(options.demo), *shlex.split(options.settings), *flags, *own]


def recipe_in(script: Path) -> ModuleType:
    """The recipe's file as a module."""
    name = f"recipe_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def plan(options: Benchmark) -> dict[str, dict[int, Parsed[Any]]]:
    """The resolved config of each run, by group and seed; all flags are read before anything is trained.

    InputError for variants that are not of --method alone.
    """
    from stepdistill.training.config import flat_yaml

    kind, found = recipe_in(options.script).Recipe, dict[str, dict[int, Parsed[Any]]]()
    found["teacher"] = {0: parse(kind, words(options, options.folder / "teacher", 0))}
    for name, flags in {CONTROL: list[str](), **options.flags()}.items():
        found[name] = {}
        for seed in options.seeds.ints():
            found[name][seed] = parsed = parse(
                kind, command(options, options.folder / name / str(seed), seed, flags)[2:]
            )
            now, plain = (flat_yaml(p.yaml) for p in (parsed, found[CONTROL][seed]))
            odd = [
                key for key in now if now[key] != plain.get(key) and not key.startswith("method.") and key not in FREE
            ]
            if odd:
                raise InputError(
                    f"expected variants of --method alone, got {odd[0]} in {name!r}, which the control would not have; give "
                    "--settings what is to hold for all"
                )
    return found


def is_done(folder: Path, result: str, config: Parsed[Any], free: tuple[str, ...] = FREE) -> bool:
    """Whether this run is finished; InputError where another one is in its place. Options that only one knows pass."""
    from stepdistill.training.config import flat_yaml

    if not (folder / result).is_file():
        return False
    now, then = flat_yaml(config.yaml), flat_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    odd = [f"{k}: {then[k]} -> {now[k]}" for k in now if k in then and now[k] != then[k] and not k.startswith(free)]
    if odd:
        raise InputError(
            f"expected a run of these options in {folder}, got {odd[0]}; take another --runs, or delete it"
        )
    return True


def collected(controls: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each number's spread over the seeds, its difference to the seed's control, and the share of the gap closed.

    Args:
        controls: what :func:`train_control` found, a seed each.
        groups: the recipe's results of each variant, in the order of these seeds.
    """
    from stepdistill.kd.evaluation import gap_closed

    plain, teachers = ([c["perplexity"][name] for c in controls] for name in (CONTROL, "teacher"))
    judged = [t for runs in groups.values() for t in (run["perplexity"]["teacher"] for run in runs)]
    if not all(math.isclose(t, teachers[0], rel_tol=1e-4) for t in (*teachers, *judged)):
        raise InputError("expected runs of one teacher, got others among them; delete them, or take another --runs")
    own = [c["own_text_reverse_kl"][CONTROL] for c in controls if "own_text_reverse_kl" in c]
    rows: dict[str, Any] = {}
    for name, runs in groups.items():
        found = [run["perplexity"]["student"] for run in runs]
        gaps = [gap_closed(*numbers) for numbers in zip(plain, found, teachers, strict=True)]
        rows[name] = {
            "perplexity": spread(found) | {"minus_control": paired(found, plain)},
            "gap_closed": spread([None if math.isnan(gap) else gap for gap in gaps]),
        }
        if own:
            text = [run["own_text_reverse_kl"]["student"] for run in runs]
            rows[name]["own_text_reverse_kl"] = spread(text) | {"minus_control": paired(text, own)}
    first = next(iter(groups.values()))[0]
    return {
        "teacher": {"perplexity": teachers[0]},
        CONTROL: {"perplexity": spread(plain), **({"own_text_reverse_kl": spread(own)} if own else {})},
        "variants": rows,
        "parameters": {"teacher": controls[0]["parameters"]["teacher"], "student": controls[0]["parameters"][CONTROL]},
        "measured": {name: first[name] for name in ("tokens", "window", "stride")},
    }


def protocol(options: Benchmark, config: Any) -> dict[str, Any]:
    """What was done: settings, steps, and the most tokens that control and students have read."""
    train, first = config.train, before_distillation(config)
    batch = train.train_batch_size * train.gradient_accumulation_steps
    return {
        "recipe": options.recipe, "settings": shlex.split(options.settings), "variants": options.flags(),
        "seeds": list(options.seeds.ints()), "learning_rate": train.learning_rate, "sft_steps": first,
        "steps": train.max_train_steps, "batch": batch,
        "tokens_seen": (first + train.max_train_steps) * batch * config.data.block_size,
    }  # fmt: skip


def main(parsed: Parsed[Benchmark]) -> None:
    """Trains what is missing, collects, writes, prints."""
    from stepdistill.bench.environment import environment

    options = parsed.recipe
    configs, seeds = plan(options), options.seeds.ints()
    if options.teacher is None:
        folder, config = options.folder / "teacher", configs["teacher"][0]
        if not is_done(folder, "model/tokenizer.json", config, NOT_THE_TEACHERS):
            train_teacher(folder, config)
    controls, groups = [], {name: list[dict[str, Any]]() for name in options.flags()}
    for seed in seeds:
        folder = options.folder / CONTROL / str(seed)
        if not is_done(folder, FOUND, configs[CONTROL][seed]):
            train_control(folder, configs[CONTROL][seed])
        controls.append(json.loads((folder / FOUND).read_text(encoding="utf-8")))
        for name, flags in options.flags().items():
            folder = options.folder / name / str(seed)
            if not is_done(folder, FACTS, configs[name][seed]):
                subprocess.run(command(options, folder, seed, flags), check=True)
            groups[name].append(json.loads((folder / FACTS).read_text(encoding="utf-8"))["results"])
    results = {**collected(controls, groups), "protocol": protocol(options, configs[CONTROL][seeds[0]].recipe)}
    results["environment"] = environment()
    output = Path(options.output or ROOT / "benchmarks" / "results" / f"{options.recipe}.json")
    output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"control: perplexity {results[CONTROL]['perplexity']['mean']:.4g}")
    for name, row in results["variants"].items():
        told = row["perplexity"]["minus_control"]
        print(
            f"{name}: perplexity {row['perplexity']['mean']:.4g}, to the control {told['mean']:+.3g} {told['interval']}"
        )
    print(f"written to {output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
