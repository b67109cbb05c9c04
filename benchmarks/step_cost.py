"""What a training step costs beyond the networks' own work: writes benchmarks/results/step_cost.json.

Three comparisons on LCM-LoRA, all as ratios: the trainer against a loop written by hand, cached latents against encoding in
the step, one base with adapters against a teacher with weights of its own. The first of them on progressive distillation of a
full student too, and on LADD of both kinds of student, whose memory is compared as well. The two sides take turns step by
step, in one thread, and it is CPU time that counts (on a GPU time), so that a busy machine slows both alike. Peak memory is
measured in processes of their own. python benchmarks/step_cost.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from step_setting import (
    FIRST_RUNG,
    LADD_FULL,
    LADD_LORA,
    LCM_LORA,
    RANK,
    SECOND_RUNG,
    UNETS,
    Setting,
    load,
    save_pipeline,
)
from torch import nn

from stepdistill.bench.environment import environment
from stepdistill.bench.metrics import bootstrap_interval
from stepdistill.config import Parsed, run
from stepdistill.errors import InputError
from stepdistill.networks.ema import EMA
from stepdistill.networks.network import parameter_bytes

WARMUP = 3  # steps at the start of a fit that are not counted
FEW = 10  # an interval of fewer pairs would only be their range
BY_HAND, ENCODING, COPIES = "trainer / loop by hand", "cached latents / encoding", "one base / two copies"
LORA = "LADD-LoRA / full LADD"
METHODS = ("lcm", "progressive", "ladd")


@dataclass
class Benchmark:
    """The cost of a step.

    Attributes:
        steps: pairs of steps in a fit, the first of which are not counted.
        repeats: fits of each comparison, and processes of each peak.
        batch: images a step.
        seed: of weights, data and noise.
        only: measure the rows of this method alone and keep the others that `output` has, which must have been measured on
            the same machine with the same options.
        output: the results file.
    """

    steps: int = 60
    repeats: int = 3
    batch: int = 8
    seed: int = 0
    only: Literal["lcm", "progressive", "ladd"] | None = None
    output: str = str(Path(__file__).parent / "results" / "step_cost.json")

    def measures(self, network: str) -> bool:
        """Whether rows of this :attr:`Row.network` are asked for."""
        return self.only in (None, METHODS[method_of(network)])

    def __post_init__(self) -> None:
        if self.steps <= WARMUP or self.repeats < 1:
            raise InputError(
                f"expected steps > {WARMUP} and repeats >= 1, got {self.steps} and {self.repeats}; fix --steps"
            )


def method_of(network: str) -> int:
    """Which of `METHODS` a :attr:`Row.network` is of."""
    return 1 if "progressive" in network else 2 if "LADD" in network else 0


@dataclass(frozen=True)
class Row:
    """One quantity of one comparison.

    Attributes:
        what: "ours / theirs".
        network: a key of `UNETS`, and what is trained where that is not LCM-LoRA.
        quantity: "CPU time", "time", "peak memory", "weights" or "weights and moments".
        ratio: the median over pairs of ours / theirs.
        interval: 95 % bootstrap interval of it; None for fewer than `FEW` pairs.
        values: medians of ours and of theirs, in seconds a step or bytes.
        n: pairs.
    """

    what: str
    network: str
    quantity: str
    ratio: float
    interval: tuple[float, float] | None
    values: tuple[float, float]
    n: int


Pairs = tuple[Sequence[float], Sequence[float]]


def compare(what: str, network: str, quantity: str, pairs: Pairs, seed: int) -> Row:
    """The row of two series that were taken in turns, value by value."""
    ratios = torch.tensor([a / b for a, b in zip(*pairs, strict=True)], dtype=torch.float64)
    interval = None
    if len(ratios) >= FEW:
        interval = bootstrap_interval(lambda r: float(r.quantile(0.5)), ratios, n=1000, seed=seed, paired=True)
    values = (statistics.median(pairs[0]), statistics.median(pairs[1]))
    return Row(what, network, quantity, float(ratios.quantile(0.5)), interval, values, len(ratios))


def trainer_and_by_hand(setting: Setting, steps: int) -> Pairs:
    """Seconds of the trainer's steps, and of those by hand between them, which train weights of their own."""
    other, theirs = Setting(setting.path, setting.batch, setting.seed, setting.trained).by_hand(), []
    ours = setting.fit(steps, lambda step: theirs.append(next(other)))
    return ours[WARMUP:], theirs[WARMUP:]


def cached_and_encoded(setting: Setting, steps: int) -> Pairs:
    """Seconds of steps on cached latents, and of every other step, which encodes its pictures and captions."""
    setting.data.encodes = lambda step: step % 2 == 1
    seconds = setting.fit(2 * steps)[2 * WARMUP :]
    return seconds[::2], seconds[1::2]


def shared_and_copied(setting: Setting, steps: int) -> Pairs:
    """Seconds of steps whose teacher is the student's base, and of every other step, whose teacher is a copy."""
    teachers = setting.method.teacher, load(setting.path).denoiser

    def swap(step: int) -> None:
        setting.method.teacher = teachers[(step + 1) % 2]

    seconds = setting.fit(2 * steps, swap)[2 * WARMUP :]
    return seconds[::2], seconds[1::2]


def weights(setting: Setting) -> Pairs:
    """Bytes of the base with the student's adapter, and of both with a teacher apart."""
    one = parameter_bytes(setting.model.denoiser.module)
    return [one], [one + parameter_bytes(load(setting.path).denoiser.module)]


def held(setting: Setting) -> int:
    """Bytes of LADD's weights, gradients, Adam's state and average, from the tensors; what networks share counts once."""
    method, networks = setting.method, setting.method.networks()
    modules = nn.ModuleList([method.teacher.module, *(network.module for network in networks.values())])
    tensors = list(EMA(networks["student"], 0.99).shadow.values())
    for network in networks.values():
        optimizer = torch.optim.AdamW(network.trainable(), lr=0.0)
        for parameter in network.trainable():
            parameter.grad = torch.zeros_like(parameter)
            tensors.append(parameter.grad)
        optimizer.step()
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return parameter_bytes(modules) + sum(t.numel() * t.element_size() for t in [*tensors, *modules.buffers()])


def peaks(other: str, path: str, options: Benchmark) -> Pairs:
    """Bytes of the trainer as it is and of the other side, `repeats` times, each in a new process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # glibc then gives freed tensors back at once, and peaks don't jitter
    )
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.repeats):
        for side, values in zip((LORA, LADD_FULL) if other == LORA else ("", other), found, strict=True):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                values.append(pool.submit(peak, side, path, options).result())
    return found


def peak(side: str, path: str, options: Benchmark) -> int:
    """Bytes that a process of a few steps holds at most, beyond what its imports take."""
    import stepdistill.families.unet
    import stepdistill.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    before = high_water()
    setting = Setting(path, options.batch, options.seed, {LADD_FULL: LADD_FULL, LORA: LADD_LORA}.get(side, LCM_LORA))
    if side == COPIES:
        setting.method.teacher = load(path).denoiser
    if side == BY_HAND:
        steps = setting.by_hand()
        for _ in range(WARMUP):
            next(steps)
    else:
        setting.fit(WARMUP)
    return high_water() - before


def high_water() -> int:
    """The most bytes this process has held: on the accelerator where there is one, else resident ones."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss begins with what the parent held when it started this process
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(options: Benchmark, paths: dict[str, str]) -> Iterator[Row]:
    """All rows; `paths` are the teachers by the keys of `UNETS`."""
    clocked = "time" if torch.accelerator.is_available() else "CPU time"

    for what, network, trained, pairs in (
        (BY_HAND, "tiny", LCM_LORA, trainer_and_by_hand),
        (BY_HAND, "demo", LCM_LORA, trainer_and_by_hand),
        (ENCODING, "demo", LCM_LORA, cached_and_encoded),
        (COPIES, "demo", LCM_LORA, shared_and_copied),
        (BY_HAND, "demo", FIRST_RUNG, trainer_and_by_hand),
        (BY_HAND, "demo", SECOND_RUNG, trainer_and_by_hand),
        (BY_HAND, "demo", LADD_FULL, trainer_and_by_hand),
        (BY_HAND, "demo", LADD_LORA, trainer_and_by_hand),
    ):
        label = network if trained == LCM_LORA else f"{network}, {trained}"
        if options.measures(label):
            given = paths[network], options.batch, options.seed, trained
            fits = [pairs(Setting(*given), options.steps) for _ in range(options.repeats)]
            ours, theirs = (list(chain.from_iterable(series)) for series in zip(*fits, strict=True))
            yield compare(what, label, clocked, (ours, theirs), options.seed)
    for network in filter(options.measures, ("demo", "wide")):
        sizes = weights(Setting(paths[network], options.batch, options.seed))
        yield compare(COPIES, network, "weights", sizes, options.seed)
        for what in (BY_HAND, COPIES):
            yield compare(what, network, "peak memory", peaks(what, paths[network], options), options.seed)
    for network in (name for name in ("demo", "wide") if options.measures(f"{name}, LADD")):
        alike = paths[network], options.batch, options.seed
        sizes = [held(Setting(*alike, LADD_LORA))], [held(Setting(*alike, LADD_FULL))]
        yield compare(LORA, f"{network}, LADD", "weights and moments", sizes, options.seed)
        yield compare(LORA, f"{network}, LADD", "peak memory", peaks(LORA, paths[network], options), options.seed)


def kept(options: Benchmark, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the results file that are not measured anew; InputError where they were measured otherwise.

    Args:
        options: whose `only` says which.
        about: protocol and environment of this run.
    """
    if options.only is None:
        return []
    path = Path(options.output)
    if not path.is_file():
        raise InputError(
            f"expected a results file whose other rows to keep, got no {path}; fix --output or drop --only"
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = data.pop("rows")
    if data != json.loads(json.dumps(about)):
        raise InputError(f"expected the options and the machine of {path} to keep rows of it, got others; drop --only")
    return [row for row in rows if not options.measures(row["network"])]


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    options = parsed.recipe
    torch.set_num_threads(1)
    asked = {name: value for name, value in asdict(options).items() if name not in ("output", "only")}
    about = {"protocol": {**asked, "warmup": WARMUP, "rank": RANK, "unets": UNETS}, "environment": environment()}
    rows = kept(options, about)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: save_pipeline(Path(folder) / name, unet, options.seed) for name, unet in UNETS.items()}
        for row in measure(options, paths):
            rows.append(asdict(row))
            print(f"{row.what}, {row.network}, {row.quantity}: {row.ratio:.3f}, interval {row.interval}", flush=True)
    rows.sort(key=lambda row: method_of(row["network"]))
    Path(options.output).write_text(
        json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
