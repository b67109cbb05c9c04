"""Students of one small language model at several seeds, each beside its control: writes benchmarks/results/lm_kd.json.

Trains the demo's teacher once, saves it, and runs recipes/lm_kd.py with its demo settings once a seed (first weights and data
order), or takes the results of runs that are finished:

python benchmarks/language_students.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "configs" / "lm_kd_demo.yaml"


@dataclass
class Benchmark:
    """Language models.

    Attributes:
        seeds: of the students.
        settings: more flags of the recipe, separated by commas.
        runs: folder of the run folders.
        output: the results file.
    """

    seeds: CommaList = field(default_factory=lambda: CommaList.parse("0,1,2"))
    settings: CommaList = field(default_factory=CommaList)
    runs: str = "out/lm_kd_seeds"
    output: str = "benchmarks/results/lm_kd.json"


def train_teacher(folder: Path) -> None:
    """The teacher of the recipe's demo, with its tokenizer, in `folder`/model."""
    from stepdistill.data.text import TextConfig, open_texts
    from stepdistill.data.tokens import rows_of
    from stepdistill.kd.language_model import NextToken
    from stepdistill.kd.pair import CAUSAL, LMStudentConfig, LMTeacherConfig, Pair
    from stepdistill.training.config import TrainConfig
    from stepdistill.training.trainer import Trainer

    options, config = yaml.safe_load(DEMO.read_text())["train"], LMTeacherConfig()
    options["max_train_steps"] = config.steps(options["max_train_steps"])
    text = TextConfig()
    texts = open_texts(text)
    trainer = Trainer(TrainConfig(**options, resume_from_checkpoint="latest"), folder)
    pair = Pair(CAUSAL, config, LMStudentConfig(), texts.train, 2048, text.block_size, 0, trainer.device)
    teacher = pair.teacher(trains=True)
    trainer.fit(NextToken(teacher), rows_of(texts.train, pair.tokenizer, text.block_size))
    for part in (teacher.frozen().module, pair.tokenizer):
        part.save_pretrained(str(folder / "model"))


def command(options: Benchmark, folder: Path, teacher: Path, seed: int) -> list[str]:
    """What trains and measures one student."""
    flags = {
        "teacher.path": teacher,
        "output_dir": folder,
        "train.seed": seed,
        "train.resume_from_checkpoint": "latest",
    }
    script = [sys.executable, str(ROOT / "recipes" / "lm_kd.py"), "--config", str(DEMO)]
    return [*script, *options.settings, *(f"--{name}={value}" for name, value in flags.items())]


def collected(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each number's mean and spread over the seeds."""
    numbers = {name: [run["perplexity"][name] for run in runs] for name in runs[0]["perplexity"]}
    numbers["gap_closed"] = [run["gap_closed"] for run in runs]
    spread = {
        name: {"mean": mean(v), "std": stdev(v) if len(v) > 1 else None, "values": v} for name, v in numbers.items()
    }
    return {**spread, **{name: runs[0][name] for name in ("tokens", "window", "stride")}}


def main(parsed: Parsed[Benchmark]) -> None:
    """Trains what is missing, collects, writes, prints."""
    from stepdistill.bench.environment import environment

    options, found = parsed.recipe, []
    if not options.seeds:
        raise InputError("expected one seed or more, got none; fix --seeds, e.g. 0,1,2")
    teacher = Path(options.runs) / "teacher" / "model"
    if not (teacher / "tokenizer.json").is_file():
        train_teacher(teacher.parent)
    for seed in options.seeds.ints():
        facts = Path(options.runs) / str(seed) / "stepdistill.json"
        if not facts.is_file():
            subprocess.run(command(options, facts.parent, teacher, seed), check=True, cwd=ROOT)
        found.append(json.loads(facts.read_text())["results"])
    results = {**collected(found), "settings": list(options.settings), "environment": environment()}
    Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    for name in (*found[0]["perplexity"], "gap_closed"):
        print(f"{name}: {results[name]['mean']:.4g} (spread {results[name]['std'] or 0:.2g}, {len(found)} seeds)")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
