"""What a distillation loss of a language model costs: writes benchmarks/results/kd_cost.json.

Forward and backward of a generalised JSD from hidden states and output layers, with gradients of the student's, ours against
TRL's and Liger's, in turns, on one thread: CPU seconds, and the most that a new process holds beyond its inputs. Ours also with
a part of the tokens masked against none. pip install -e '.[peers]'; python benchmarks/kd_cost.py
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kd_sides import OURS, SIDES, Setting, available, installed
from metric_cost import BALLAST, alone
from step_cost import Row, compare, high_water

from stepdistill.bench.environment import environment
from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

MASKED = "ours with masked tokens"


@dataclass
class Benchmark:
    """The cost of a distillation loss.

    Attributes:
        tokens: numbers of them in a batch.
        vocabulary: entries of both heads.
        student_width: of hidden states.
        teacher_width: the same.
        beta: of the JSD.
        valid: share of valid tokens, in the comparison with all of them.
        repeats: losses of each side.
        processes: for each peak.
        seed: of states and weights.
        output: the results file.
    """

    tokens: CommaList = CommaList(("512", "1024"))  # noqa: RUF009  # immutable
    vocabulary: int = 50_257
    student_width: int = 768
    teacher_width: int = 1024
    beta: float = 0.5
    valid: float = 0.25
    repeats: int = 10
    processes: int = 3
    seed: int = 0
    output: str = str(Path(__file__).parent / "results" / "kd_cost.json")

    def __post_init__(self) -> None:
        numbers = (*self.tokens.ints(), self.vocabulary, self.student_width, self.teacher_width)
        if not self.tokens or min(*numbers, self.repeats, self.processes) < 1:
            raise InputError(f"expected --tokens, sizes, --repeats and --processes of at least 1, got {self}")
        if not 0.0 < self.valid <= 1.0:
            raise InputError(f"expected --valid in (0, 1], got {self.valid}")

    def setting(self, tokens: int, valid: float = 1.0) -> Setting:
        """The inputs of so many tokens."""
        widths = (self.student_width, self.teacher_width)
        return Setting.drawn(tokens, self.vocabulary, widths, self.beta, self.seed, valid)


def quiet() -> None:
    """One thread; experimental features are announced by a warning each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def warm_up(side: str, options: Benchmark) -> None:
    """What is imported and set up once."""
    setting = Setting.drawn(32, 64, (16, 16), options.beta, 0)
    setting.gradients(SIDES[side](setting))


def peak(side: str, tokens: int, valid: float, options: Benchmark) -> int:
    """Bytes that this process holds at most in a forward and backward, beyond the inputs; the gradients are among them."""
    quiet()
    warm_up(side, options)
    setting = options.setting(tokens, valid)
    ballast = torch.ones(BALLAST, dtype=torch.float64)  # more than imports held for a moment, so the most is now
    before = high_water()
    setting.gradients(SIDES[side](setting))
    found = high_water() - before
    del ballast
    return found


def timed(side: str, setting: Setting) -> tuple[float, list[float]]:
    """CPU seconds of a forward and backward; its loss and the norms of its gradients."""
    began = time.process_time()
    loss = SIDES[side](setting)
    gradients = setting.gradients(loss)
    seconds = time.process_time() - began
    return seconds, [float(loss.detach()), *(float(g.norm()) for g in gradients)]


def times(tokens: int, sides: list[str], options: Benchmark) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(seconds of each side, taken in turns, the last of them ours with masked tokens, what all found)."""
    quiet()
    whole, part = options.setting(tokens), options.setting(tokens, options.valid)
    turns = {**dict.fromkeys(sides, whole), MASKED: part}
    seconds: dict[str, list[float]] = {side: [] for side in turns}
    values = {}
    for side in sides:
        warm_up(side, options)
    for _ in range(options.repeats):
        for side, setting in turns.items():
            found, values[side] = timed(OURS if side == MASKED else side, setting)
            seconds[side].append(found)
    return seconds, values


def measure(options: Benchmark) -> Iterator[tuple[Row, dict[str, list[float]]]]:
    """All rows, each with the losses and gradient norms that its sides found."""
    sides = available()
    for n in options.tokens.ints():
        # here, and not alone: what keeps peaks steady makes every allocation dear
        seconds, values = times(n, sides, options)
        shares = {**dict.fromkeys(sides, 1.0), MASKED: options.valid}
        turns = [
            {side: alone(peak, OURS if side == MASKED else side, n, valid, options) for side, valid in shares.items()}
            for _ in range(options.processes)
        ]
        for side in sides[1:]:
            found = {name: values[name] for name in (OURS, side)}
            yield compare(f"ours / {side}", f"N = {n}", "CPU time", (seconds[OURS], seconds[side]), options.seed), found
            pairs = [t[OURS] for t in turns], [t[side] for t in turns]
            yield compare(f"ours / {side}", f"N = {n}", "peak memory", pairs, options.seed), {}
        what = f"{options.valid:.0%} valid / all valid"
        yield compare(what, f"N = {n}", "CPU time", (seconds[MASKED], seconds[OURS]), options.seed), {}
        pairs = [t[MASKED] for t in turns], [t[OURS] for t in turns]
        yield compare(what, f"N = {n}", "peak memory", pairs, options.seed), {}


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    options = parsed.recipe
    rows: list[dict[str, Any]] = []
    asked = {name: value for name, value in asdict(options).items() if name != "output"}
    about = {
        "protocol": {**asked, "threads": 1, "dtype": "float32"},
        "environment": {**environment(), **installed()},
    }
    for row, values in measure(options):
        rows.append({**asdict(row), "found": values})
        text = json.dumps({**about, "rows": rows}, indent=1, allow_nan=False)
        Path(options.output).write_text(text + "\n", encoding="utf-8")
        print(f"{row.what}, {row.network}, {row.quantity}: {row.ratio:.3f}, interval {row.interval}", flush=True)
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
