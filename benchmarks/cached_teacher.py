"""What a cached teacher saves: writes benchmarks/results/cached_teacher.json.

Steps of distillation on text (forward, backward, AdamW) with a GPT-2 layout as teacher in the step against its cached answers,
in turns, on one thread: CPU seconds. And the bytes of an answer by k, on disk, against those of whole distributions.
python benchmarks/cached_teacher.py
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from step_cost import compare

from stepdistill.bench.environment import environment
from stepdistill.config import CommaList, Parsed, run
from stepdistill.data.text import open_texts
from stepdistill.data.tokens import TokenRows, rows_of
from stepdistill.errors import InputError
from stepdistill.kd.caching import TeacherCacheConfig, cache_answers
from stepdistill.kd.divergences import Divergence
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig
from stepdistill.kd.layouts import gpt2_layout, train_tokenizer
from stepdistill.kd.networks import CausalLM, sizes
from stepdistill.kd.signal import LiveTeacher, Signal
from stepdistill.kd.teacher_cache import CachedRows, Key
from stepdistill.networks.lora import StudentConfig
from stepdistill.randomness import StepRandom

PEER = {"name": "DistillKit, k = 128, by its README", "bytes": 300}


@dataclass
class Benchmark:
    """The cost of a step with a cached teacher, and the size of its answers.

    Attributes:
        k: of the caches; steps are timed with the first.
        rows: of the data that are cached.
        block_size: tokens of each.
        batch: rows a step.
        vocabulary: of the tokenizer.
        teacher: layers and width.
        student: the same.
        repeats: steps of each side.
        seed: of weights.
        output: the results file.
    """

    k: CommaList = CommaList(("64", "128"))  # noqa: RUF009  # immutable
    rows: int = 64
    block_size: int = 128
    batch: int = 4
    vocabulary: int = 8192
    teacher: CommaList = CommaList(("6", "512"))  # noqa: RUF009
    student: CommaList = CommaList(("2", "128"))  # noqa: RUF009
    repeats: int = 20
    seed: int = 0
    output: str = str(Path(__file__).parent / "results" / "cached_teacher.json")

    def __post_init__(self) -> None:
        if min(*self.k.ints(), self.rows, self.batch, self.repeats) < 1 or self.rows < self.batch:
            raise InputError(
                f"expected --k, --rows, --batch and --repeats of at least 1, a batch of rows at least, got {self}"
            )


@dataclass(frozen=True)
class Setting:
    """Data and networks; the student starts anew for each side."""

    data: TokenRows
    tokenizer: Any
    teacher: CausalLM
    options: Benchmark

    @classmethod
    def made(cls, options: Benchmark) -> Setting:
        """Docstrings, a tokenizer of them and a teacher with random weights, whose forward costs what a trained one's does."""
        from stepdistill.data.text import TextConfig

        examples = open_texts(TextConfig(block_size=options.block_size)).train
        tokenizer = train_tokenizer(examples, options.vocabulary, options.block_size)
        data = rows_of(examples, tokenizer, options.block_size)
        layers, width = options.teacher.ints()
        teacher = CausalLM(gpt2_layout(layers, width, tokenizer, options.block_size, options.seed)).frozen()
        return cls(TokenRows(data.rows[: options.rows], data.pad), tokenizer, teacher, options)

    def student(self) -> CausalLM:
        """The same each time."""
        layers, width = self.options.student.ints()
        net = gpt2_layout(layers, width, self.tokenizer, self.options.block_size, self.options.seed + 1)
        return CausalLM(net).student(StudentConfig(kind="full"))

    def cached(self, folder: Path, k: int) -> tuple[CachedRows, int]:
        """(the data with answers, their bytes on disk)."""
        key = Key.of({"path": "random", "sha256": "0"}, self.data, self.tokenizer, {})
        cache_answers(folder, self.teacher, self.data, key, TeacherCacheConfig(k), progress=False)
        return CachedRows(folder, self.data, key), sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def steps(setting: Setting, data: TokenRows | CachedRows, signal: Signal) -> Callable[[int], tuple[float, float]]:
    """Of the number of a step: its CPU seconds, from the data to the optimizer, and its loss."""
    student = setting.student()
    method = LanguageModelKD(LanguageModelKDConfig(Divergence("forward_kl")), student, signal)
    optimizer = torch.optim.AdamW(student.trainable(), lr=1e-4)
    batch = setting.options.batch

    def step(number: int) -> tuple[float, float]:
        began = time.process_time()
        chosen = [(number * batch + i) % len(data) for i in range(batch)]
        loss = method.training_step(data.batch(chosen, StepRandom(0, number, chosen))).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began, float(loss.detach())

    return step


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    options = parsed.recipe
    torch.set_num_threads(1)
    setting = Setting.made(options)
    entries, tokens = setting.teacher.vocabulary, options.rows * (options.block_size - 1)
    storage = []
    with tempfile.TemporaryDirectory() as folder:
        for k in options.k.ints():
            data, size = setting.cached(Path(folder) / str(k), k)
            storage.append(
                {"k": k, "bytes": size, "bytes_per_token": size / tokens, "of_fp16": size / tokens / entries / 2}
            )
            if k == options.k.ints()[0]:
                first = data
        sides = {
            "cached": steps(setting, first, first.teacher),
            "live": steps(setting, setting.data, LiveTeacher(setting.teacher)),
        }
        for step in sides.values():
            step(0)  # what is set up once
        found = [{name: step(number) for name, step in sides.items()} for number in range(1, options.repeats + 1)]
    pairs = [f["cached"][0] for f in found], [f["live"][0] for f in found]
    row = compare("cached teacher / live", f"k = {options.k[0]}", "CPU time", pairs, options.seed)
    losses = {name: [f[name][1] for f in found] for name in sides}
    asked = {name: value for name, value in asdict(options).items() if name != "output"}
    parameters = sizes({"teacher": setting.teacher, "student": setting.student()})
    results = {
        "protocol": {**asked, "parameters": parameters, "entries": entries, "tokens": tokens, "threads": 1},
        "environment": environment(),
        "rows": [{**asdict(row), "losses": losses}],
        "storage": {"caches": storage, "dense": {"fp16": 2 * entries, "fp32": 4 * entries}, "peer": PEER},
    }
    Path(options.output).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{row.what}: {row.ratio:.3f}, interval {row.interval}, seconds {row.values}")
    print(*(f"k = {s['k']}: {s['bytes_per_token']:.1f} bytes a token" for s in storage), sep="\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
