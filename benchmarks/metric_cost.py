"""What the Frechet distance costs: writes benchmarks/results/metric_cost.json.

Memory: the most that a new process holds while it takes in N features, beyond what it held before. Time: CPU seconds from a
model's features to their distance from fixed moments, ours against torchmetrics and against SciPy's matrix root, in turns, on
one thread. python benchmarks/metric_cost.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from metric_sides import OURS, SCIPY, TORCHMETRICS, distances, drawn, taker
from step_cost import Row, compare, high_water

from stepdistill.bench.environment import environment
from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

# of new processes: one thread in every library, memory that goes back to the system when freed, no accelerator
ALONE = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "CUDA_VISIBLE_DEVICES": "",
}
BALLAST = 2**26  # doubles


@dataclass
class Benchmark:
    """The cost of a Frechet distance.

    Attributes:
        counts: numbers of features whose peak memory is taken, at the last of `dims`.
        dims: lengths of a feature vector.
        features: how many the time is taken of.
        batch: features that come at once.
        repeats: distances of each side.
        processes: for each peak.
        seed: of the features.
        output: the results file.
    """

    counts: CommaList = CommaList(("1000", "10000", "100000"))  # noqa: RUF009  # immutable
    dims: CommaList = CommaList(("768", "2048"))  # noqa: RUF009  # immutable
    features: int = 10_000
    batch: int = 250
    repeats: int = 10
    processes: int = 3
    seed: int = 0
    output: str = str(Path(__file__).parent / "results" / "metric_cost.json")

    def __post_init__(self) -> None:
        numbers = (*self.counts.ints(), *self.dims.ints(), self.batch, self.repeats, self.processes)
        if not self.counts or not self.dims or min(numbers) < 1 or self.features < 2:
            raise InputError(
                "expected --counts, --dims, --batch, --repeats and --processes of at least 1 and --features of at least 2, "
                f"got {self}"
            )


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, ALONE), ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *arguments).result()


def peak(side: str, n: int, dim: int, options: Benchmark) -> int:
    """Bytes that this process holds at most while it takes in n features, beyond one batch of them."""
    torch.set_num_threads(1)
    features = drawn(min(n, options.batch), dim, options.seed)
    taker(side, 8)(drawn(9, 8, 0))  # libraries' own buffers
    ballast = torch.ones(BALLAST, dtype=torch.float64)  # more than imports held for a moment, so the most is now
    before = high_water()
    take = taker(side, dim)
    for first in range(0, n, options.batch):
        take(features[: n - first])
    found = high_water() - before
    del ballast
    return found


def times(dim: int, options: Benchmark) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of each side's distances, taken in turns, and what the distance is."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Frechet distance of")
    for distance in distances(drawn(99, 8, 0), options.batch).values():
        distance(drawn(99, 8, 1))  # what is imported and set up once
    sides = distances(drawn(options.features, dim, options.seed), options.batch)
    features = drawn(options.features, dim, options.seed + 1)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    values = {}
    for _ in range(options.repeats):
        for side, distance in sides.items():
            began = time.process_time()
            values[side] = distance(features)
            seconds[side].append(time.process_time() - began)
    return seconds, values


def measure(options: Benchmark) -> Iterator[tuple[Row, dict[str, float]]]:
    """All rows, each with the distances that its sides found."""
    dims, theirs = options.dims.ints(), (OURS, TORCHMETRICS)
    for n in options.counts.ints():
        turns = [[alone(peak, side, n, dims[-1], options) for side in theirs] for _ in range(options.processes)]
        ours, other = zip(*turns, strict=True)
        name = f"peak memory, N = {n}"
        yield compare(f"{OURS} / {TORCHMETRICS}", f"d = {dims[-1]}", name, (ours, other), options.seed), {}
    for dim in dims:
        seconds, values = alone(times, dim, options)
        for side in (TORCHMETRICS, SCIPY):
            pairs, name = (seconds[OURS], seconds[side]), f"CPU time, N = {options.features}"
            row = compare(f"{OURS} / {side}", f"d = {dim}", name, pairs, options.seed)
            yield row, {name: values[name] for name in (OURS, side)}


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    options, rows = parsed.recipe, []
    for row, values in measure(options):
        rows.append({**asdict(row), "distances": values})
        print(f"{row.what}, {row.network}, {row.quantity}: {row.ratio:.3f}, interval {row.interval}", flush=True)
    asked = {name: value for name, value in asdict(options).items() if name != "output"}
    protocol = {**asked, "threads": 1, "dtype": "float64"}
    text = json.dumps({"protocol": protocol, "environment": environment(), "rows": rows}, indent=1, allow_nan=False)
    Path(options.output).write_text(text + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
