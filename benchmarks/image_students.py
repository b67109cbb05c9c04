"""Students of an image classifier at several temperatures and seeds, beside their control: benchmarks/results/hinton.json.

Runs recipes/hinton.py with its demo's options, or takes the run that is finished; a stopped one goes on:

python benchmarks/image_students.py
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from seed_spread import paired, spread

from stepdistill.config import Parsed, run
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "hinton.py"
DEMO = ROOT / "recipes" / "configs" / "hinton_demo.yaml"


@dataclass
class Benchmark:
    """Image classifiers.

    Attributes:
        seeds: students of each group.
        temperatures: of the soft term, a group each.
        settings: more of the recipe's flags.
        runs: the run folder.
        output: the results file.
    """

    seeds: int = 5
    temperatures: str = "1,4,10"
    settings: str = ""
    runs: str = "out/hinton_seeds"
    output: str = "benchmarks/results/hinton.json"


def command(options: Benchmark) -> list[str]:
    """What trains and measures all students."""
    flags = [f"--seeds={options.seeds}", f"--temperatures={options.temperatures}", f"--output_dir={options.runs}"]
    resume = "--train.resume_from_checkpoint=latest"
    return [sys.executable, str(RECIPE), "--config", str(DEMO), *shlex.split(options.settings), *flags, resume]


def collected(found: dict[str, Any]) -> dict[str, Any]:
    """Accuracies of each group with their spread, and of the taught ones the difference to the control, seed by seed.

    Args:
        found: the recipe's results. InputError where they have no control group.
    """
    from stepdistill.export.classifier import CONTROL, gap_closed

    groups, best = found["accuracy"], found["teacher_accuracy"]
    if CONTROL not in groups:
        raise InputError("expected a run with a control group, got one without; drop --control from --settings")
    plain = groups[CONTROL]
    rows = {
        name: spread(values)
        | {
            "minus_control": paired(values, plain),
            "gap_closed": spread([gap_closed(*numbers, best) for numbers in zip(plain, values, strict=True)]),
        }
        for name, values in groups.items()
        if name != CONTROL
    }
    kept = {name: found[name] for name in ("parameters", "test_images", "trained_on", "latency_ms")}
    return {"teacher": best, "control": spread(plain), "groups": rows, **kept}


def protocol(options: Benchmark) -> dict[str, Any]:
    """Of the run's resolved config, what the table says."""
    config = yaml.safe_load((Path(options.runs) / "config.yaml").read_text(encoding="utf-8"))
    train = config["train"]
    return {
        "seeds": options.seeds, "teacher_steps": config["teacher_steps"], "steps": train["max_train_steps"],
        "batch": train["train_batch_size"] * train["gradient_accumulation_steps"],
        "learning_rate": train["learning_rate"], "weights": [config["method"][k] for k in ("kd_weight", "ce_weight")],
        "settings": shlex.split(options.settings),
    }  # fmt: skip


def main(parsed: Parsed[Benchmark]) -> None:
    """Runs the recipe unless its results are there, collects, writes, prints."""
    from stepdistill.bench.environment import environment

    options = parsed.recipe
    facts = Path(options.runs) / "stepdistill.json"
    if not facts.is_file():
        subprocess.run(command(options), check=True)
    results = collected(json.loads(facts.read_text(encoding="utf-8"))["results"])
    results |= {"protocol": protocol(options), "environment": environment()}
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    Path(options.output).write_text(text, encoding="utf-8")
    print(f"control: {results['control']['mean']:.1%}")
    for name, row in results["groups"].items():
        difference = row["minus_control"]
        print(f"{name}: {row['mean']:.1%}, to the control {difference['mean']:+.1%} {difference['interval']}")
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
