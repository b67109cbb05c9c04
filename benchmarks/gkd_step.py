"""What a step of GKD costs: writes benchmarks/results/gkd_step.json.

Our Trainer's loop against TRL's GKDTrainer.train on the same pair of small GPT-2 layouts, text and optimizer, in turns step by
step in one process, on one thread: CPU seconds from the end of one step to the end of the next, the other side's left out. With
lmbda 0 both must find the same losses, with 1 both write the same number of tokens. TRL saves nothing and logs each tenth step;
ours logs each. pip install -e '.[peers]'; python benchmarks/gkd_step.py
"""

from __future__ import annotations

import json
import logging
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gkd_sides import LEARNING_RATE, STUDENT, TEACHER, Found, Setting, has_trl, turns
from step_cost import WARMUP, Row, compare

from stepdistill.bench.environment import environment
from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

WHAT = "ours / TRL's GKDTrainer"
CLOSE = 1e-5  # what the losses of one batch may differ by


@dataclass
class Benchmark:
    """The cost of a step of GKD.

    Attributes:
        vocabulary: entries of both heads, several sizes.
        batch: rows a step.
        prompt: tokens of a prompt.
        new: tokens after it.
        beta: of the JSD.
        steps: of each side, the first of which are not counted.
        seed: of weights, rows and what is written.
        output: the results file.
    """

    vocabulary: CommaList = CommaList(("2048", "50257"))  # noqa: RUF009  # immutable
    batch: int = 4
    prompt: int = 16
    new: int = 32
    beta: float = 0.5
    steps: int = 15
    seed: int = 0
    output: str = str(Path(__file__).parent / "results" / "gkd_step.json")

    def __post_init__(self) -> None:
        if not self.vocabulary or min(*self.vocabulary.ints(), self.batch, self.prompt, self.new) < 1:
            raise InputError(f"expected --vocabulary, --batch, --prompt and --new of at least 1, got {self}")
        if self.steps <= WARMUP:
            raise InputError(f"expected steps > {WARMUP}, got {self.steps}; fix --steps")

    def settings(self) -> Iterator[Setting]:
        """Each vocabulary with the data's text and with the student's."""
        for vocabulary in self.vocabulary.ints():
            for lmbda in (0.0, 1.0):
                yield Setting(vocabulary, lmbda, self.batch, self.prompt, self.new, self.beta, self.seed)


def quiet() -> None:
    """One thread; what TRL recommends to users of it is not asked here."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("trl", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def same_work(setting: Setting, mine: Found, theirs: Found) -> dict[str, Any]:
    """What both sides found; RuntimeError where their steps are not of the same work."""
    wanted = setting.batch * setting.new
    if {*mine.tokens, *theirs.tokens} != {wanted}:
        raise RuntimeError(f"expected {wanted} tokens in each step, got {mine.tokens} and {theirs.tokens}")
    about = {"tokens": wanted, "first loss": [mine.losses[0], theirs.losses[0]]}
    about["mean loss"] = [statistics.fmean(side.losses) for side in (mine, theirs)]
    if setting.lmbda == 0.0:
        apart = [abs(a - b) for a, b in zip(mine.losses, theirs.losses, strict=True)]
        if not all(difference <= CLOSE for difference in apart):  # NaN too, which max() may pass over
            raise RuntimeError(f"expected losses within {CLOSE} of each other, got {mine.losses} and {theirs.losses}")
        about["largest difference of losses"] = max(apart)
    return about


def measure(options: Benchmark) -> Iterator[tuple[Row, dict[str, Any]]]:
    """All rows, each with what :func:`same_work` says."""
    for setting in options.settings():
        mine, theirs = turns(setting, options.steps)
        name = f"V = {setting.vocabulary:,}, lmbda {setting.lmbda:g}"
        pairs = mine.seconds[WARMUP:], theirs.seconds[WARMUP:]
        yield compare(WHAT, name, "CPU time", pairs, options.seed), same_work(setting, mine, theirs)


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    options = parsed.recipe
    if not has_trl():
        raise InputError("expected TRL to compare with, got none; pip install -e '.[peers]'")
    quiet()
    rows: list[dict[str, Any]] = []
    asked = {name: value for name, value in asdict(options).items() if name != "output"}
    layouts = {"teacher": TEACHER, "student": STUDENT, "optimizer": f"AdamW, {LEARNING_RATE:g}, clipped at 1"}
    about = {
        "protocol": {**asked, **layouts, "warmup": WARMUP, "threads": 1, "dtype": "float32"},
        "environment": {**environment(), **{name: version(name) for name in ("trl", "accelerate")}},
    }
    for row, found in measure(options):
        rows.append({**asdict(row), "found": found})
        text = json.dumps({**about, "rows": rows}, indent=1, allow_nan=False)
        Path(options.output).write_text(text + "\n", encoding="utf-8")
        print(f"{row.what}, {row.network}, {row.quantity}: {row.ratio:.3f}, interval {row.interval}", flush=True)
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
