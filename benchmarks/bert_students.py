"""Students of BERT layouts over seeds, beside teacher and control: benchmarks/results/distilbert.json and tinybert.json.

Runs recipes/distilbert.py or recipes/tinybert.py once a seed with its demo's options; each run trains a teacher, a control and
a student of its own. What is finished is not done again, what was stopped goes on:

python benchmarks/bert_students.py
python benchmarks/bert_students.py --recipe tinybert --seeds 0,1,2
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from language_students import is_done, recipe_in
from seed_spread import paired, spread

from stepdistill.config import CommaList, Parsed, parse, run
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FACTS = "stepdistill.json"
TEACHER, CONTROL, STUDENT, BEFORE = "teacher", "control", "student", "before"
MEASURES = ("perplexity", "accuracy")  # of each model, where the recipe has it
SAME = ("masked_words", "tokens", "window", "masks", "test_texts", "trained_on", "classes", "layers")  # in all seeds


@dataclass
class Benchmark:
    """Encoders.

    Attributes:
        recipe: distilbert or tinybert, with a demo in recipes/configs/.
        seeds: a run each, of teacher, control and student.
        settings: more of the recipe's flags, for all runs.
        runs: folder of the run folders; out/RECIPE_seeds by default.
        output: the results file; benchmarks/results/RECIPE.json by default.
    """

    recipe: str = "distilbert"
    seeds: CommaList = field(default_factory=lambda: CommaList.parse("0,1,2"))
    settings: str = ""
    runs: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.recipe not in ("distilbert", "tinybert"):
            raise InputError(f"expected distilbert or tinybert, got {self.recipe!r}; fix --recipe")
        if len(set(self.seeds.ints())) != len(self.seeds) or not self.seeds:
            raise InputError(f"expected seeds, each once, got {','.join(self.seeds)!r}; fix --seeds, e.g. 0,1,2")

    @property
    def script(self) -> Path:
        """The recipe."""
        return ROOT / "recipes" / f"{self.recipe}.py"

    def folder(self, seed: int) -> Path:
        """Of a seed's run."""
        return Path(self.runs or ROOT / "out" / f"{self.recipe}_seeds") / str(seed)


def command(options: Benchmark, seed: int) -> list[str]:
    """What trains and measures the models of a seed."""
    demo = ROOT / "recipes" / "configs" / f"{options.recipe}_demo.yaml"
    own = [f"--output_dir={options.folder(seed)}", f"--train.seed={seed}", "--train.resume_from_checkpoint=latest"]
    return [sys.executable, str(options.script), "--config", str(demo), *shlex.split(options.settings), *own]


def collected(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each model's numbers with their spread, and of the taught ones the differences to control and teacher, seed by seed.

    Args:
        runs: the recipe's results, a seed each. InputError without a control group, or for runs on other data.
    """
    first = runs[0]
    for found in runs:
        if CONTROL not in found["accuracy"]:
            raise InputError("expected runs with a control group, got one without; drop --control from --settings")
        if odd := [name for name in SAME if found.get(name) != first.get(name)]:
            raise InputError(
                f"expected runs on the same data, got {odd[0]} {first.get(odd[0])} and {found.get(odd[0])}; delete the runs of "
                "other options, or take another --runs"
            )
    models: dict[str, dict[str, Any]] = {name: {} for name in first["accuracy"]}
    for measure in (name for name in MEASURES if name in first):
        values = {name: [found[measure][name] for found in runs] for name in models}
        for name in models:
            models[name][measure] = spread(values[name])
            if name not in (TEACHER, CONTROL, BEFORE):
                for other in (CONTROL, TEACHER):
                    models[name][measure][f"minus_{other}"] = paired(values[name], values[other])
    return {
        "models": models,
        "gap_closed": spread([found["gap_closed"] for found in runs]),
        "parameters": first["parameters"],
        "measured": {name: first[name] for name in SAME if name in first},
    }


def protocol(options: Benchmark, config: Any) -> dict[str, Any]:
    """What was done: settings, and the optimizer steps of each training by its fit's name."""
    train = config.train
    steps = {TEACHER: config.teacher.steps(train.max_train_steps)}
    if options.recipe == "tinybert":
        stages = config.stages
        steps |= {"fine-tuning": stages.tuning, "general": stages.general, "intermediate": stages.intermediate}
        steps |= {"prediction": train.max_train_steps, "control-general": stages.general}
        steps |= {CONTROL: stages.intermediate + train.max_train_steps}
    else:
        groups = [*["random"] * config.random, CONTROL, STUDENT]
        steps |= dict.fromkeys(groups, train.max_train_steps)
    return {
        "recipe": options.recipe, "settings": shlex.split(options.settings), "seeds": list(options.seeds.ints()),
        "steps": steps, "batch": train.train_batch_size * train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate, "block_size": config.data.block_size,
    }  # fmt: skip


def main(parsed: Parsed[Benchmark]) -> None:
    """Trains what is missing, collects, writes, prints."""
    from stepdistill.bench.environment import environment

    options = parsed.recipe
    kind, seeds = recipe_in(options.script).Recipe, options.seeds.ints()
    configs = {
        seed: parse(kind, command(options, seed)[2:]) for seed in seeds
    }  # all are read before anything is trained
    for seed, config in configs.items():
        if not is_done(options.folder(seed), FACTS, config):
            subprocess.run(command(options, seed), check=True)
    runs = [json.loads((options.folder(seed) / FACTS).read_text(encoding="utf-8"))["results"] for seed in seeds]
    results = {**collected(runs), "protocol": protocol(options, configs[seeds[0]].recipe), "environment": environment()}
    output = Path(options.output or ROOT / "benchmarks" / "results" / f"{options.recipe}.json")
    output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, row in results["models"].items():
        for measure, found in row.items():
            told = found.get("minus_control")
            against = f", to the control {told['mean']:+.3g} {told['interval']}" if told else ""
            print(f"{name}: {measure} {found['mean']:.4g}{against}")
    print(f"written to {output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
