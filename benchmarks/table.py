"""Writes the tables of README.md and docs/ from benchmarks/results, so that no figure there was typed.

python benchmarks/table.py                                 # from the results files that are there
python benchmarks/table.py --take out/bench/results.json   # keep a sweep of the demo as the README's first
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd_table import kd_methods
from student_tables import bert_students, image_students, language_students, own_text_students

from stepdistill.bench.rows import Results
from stepdistill.bench.table import aligned, markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks") / "results"
SWEEP = RESULTS / "demo_bench.json"


@dataclass(frozen=True)
class Block:
    """A part of a document, between two comments.

    Attributes:
        document: its path in the repository.
        name: in the comments.
        source: the results file, in the repository.
        written: text from that file.
    """

    document: str
    name: str
    source: Path
    written: Callable[[Path], str]

    @property
    def begin(self) -> str:
        """The comment before it."""
        return f"<!-- {self.name}: written by benchmarks/table.py -->"

    @property
    def end(self) -> str:
        """The comment after it."""
        return f"<!-- end of {self.name} -->"

    def write(self, root: Path) -> None:
        """Puts the text between the comments; without them, or without the results, a line on stderr says so."""
        path, source = root / self.document, root / self.source
        if not source.is_file():
            print(f"{self.source} is not there: {self.name} in {self.document} stays as it is", file=sys.stderr)
            return
        before, found, rest = path.read_text(encoding="utf-8").partition(self.begin)
        _, closed, after = rest.partition(self.end)
        if not (found and closed):
            print(f"{self.document} lacks {self.begin} ... {self.end}: this part is not written", file=sys.stderr)
            return
        text = f"{before}{self.begin}\n\n{self.written(source).strip()}\n\nFrom `{self.source}`.\n\n{self.end}{after}"
        path.write_text(text, encoding="utf-8")


def results_table(path: Path) -> str:
    """The table of a sweep, with what is needed to read it."""
    return markdown(Results.read(path))


def _ratios(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The protocol and the lines of a table of ratios; the environment's facts are in the protocol too."""
    data = json.loads(path.read_text(encoding="utf-8"))
    head = ["ours / theirs", "of", "quantity", "ratio", "95 % interval", "ours", "theirs", "pairs"]
    return {**data["environment"], **data["protocol"]}, aligned(head, [_ratio_cells(row) for row in data["rows"]])


def _ratio_cells(row: dict[str, Any]) -> list[str]:
    ours, theirs = (_amount(row["quantity"], value) for value in row["values"])
    interval = "" if row["interval"] is None else "[{:.3f}, {:.3f}]".format(*row["interval"])
    return [row["what"], row["network"], row["quantity"], f"{row['ratio']:.3f}", interval, ours, theirs, str(row["n"])]


def _amount(quantity: str, value: float) -> str:
    """Milliseconds or MiB."""
    return f"{value * 1e3:.1f} ms" if "time" in quantity else f"{value / 2**20:.1f} MiB"


def step_cost(path: Path) -> str:
    """What benchmarks/step_cost.py measured, and how to read it."""
    about, lines = _ratios(path)
    how = (
        f"LCM-LoRA of rank {about['rank']}, or where it says so progressive distillation of a full student in a rung with k "
        "evaluations of the teacher a step (guided: each with and without the prompt, in one batch of twice the size), or LADD "
        "of a full student or a LoRA of that rank, R1 on every step; weights and moments are those of all networks, heads too, "
        "with gradients, Adam's state and the average; "
        f"batch {about['batch']}; tiny, demo and wide are UNets in the demo's pipeline. "
        "Steps of both sides take turns in one process; ratios are medians over pairs. Peak memory is what comes on top of "
        f"imports, in processes of its own (torch {about['torch']}, accelerator {about['accelerator']}, "
        f"{about['threads']} CPU thread, seed {about['seed']})."
    )
    return "\n".join([*lines, "", how])


def metric_cost(path: Path) -> str:
    """What benchmarks/metric_cost.py measured, and how to read it."""
    about, lines = _ratios(path)
    how = (
        f"Float64, {about['threads']} CPU thread, torch {about['torch']}, torchmetrics {about['torchmetrics']}. Memory is what "
        "comes on top of one batch of features, in processes of its own; times are taken in turns in one process, from "
        "features to their distance from fixed moments."
    )
    return "\n".join([*lines, "", how])


def kd_cost(path: Path) -> str:
    """What benchmarks/kd_cost.py measured, and how to read it."""
    about, lines = _ratios(path)
    how = (
        f"JSD of beta {about['beta']} from hidden states of width {about['student_width']} and {about['teacher_width']} over "
        f"{about['vocabulary']:,} tokens, forward and backward, {about['dtype']}, {about['threads']} CPU thread, torch "
        f"{about['torch']}, TRL {about['trl']}, Liger {about['liger-kernel']} without compilation. Times in turns; "
        "peak memory is what comes on top of the inputs, in processes of their own."
    )
    return "\n".join([*lines, "", how])


def gkd_step(path: Path) -> str:
    """What benchmarks/gkd_step.py measured, and how to read it."""
    about, lines = _ratios(path)
    (deep, wide), (layers, width) = about["teacher"], about["student"]
    how = (
        f"GPT-2 layouts, teacher {deep} x {wide}, student {layers} x {width}; {about['batch']} rows a step of "
        f"{about['prompt']} tokens and {about['new']} that count, the data's with lmbda 0, the student's with 1; JSD of beta "
        f"{about['beta']}, {about['optimizer']}, {about['dtype']}, {about['threads']} CPU thread, torch {about['torch']}, "
        f"transformers {about['transformers']}, TRL {about['trl']}. Whole steps of both training loops, in turns; with lmbda 0 "
        f"both find the same losses to {_apart(path):.0e} in all of them."
    )
    return "\n".join([*lines, "", how])


def _apart(path: Path) -> float:
    """The most that losses of one batch differed by."""
    found = [row["found"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return max(row["largest difference of losses"] for row in found if "largest difference of losses" in row)


def kd_step(path: Path) -> str:
    """What benchmarks/kd_step.py measured, and how to read it."""
    about, lines = _ratios(path)
    (deep, wide), (layers, width) = about["teacher"], about["student"]
    how = (
        "Ours is the batch, the method's loss with all that it writes, backward, AdamW; bare calls are those of the networks "
        "that any implementation makes, by stock Transformers: one token after the other where text is written, the teacher's "
        "forward, the student's, backward from gradients that are there beforehand, AdamW. The same weights and shapes, which "
        f"each row has checked, in turns, {about['dtype']}, {about['threads']} CPU thread. GPT-2 and BERT layouts, teacher "
        f"{deep} x {wide}, student {layers} x {width} (of DistilBERT {layers} x {wide}), {int(about['vocabulary']):,} tokens; "
        f"{about['batch']} texts of {about['block']} tokens, or prompts of {about['prompt']} with {about['new']} more, written "
        f"or replayed; {about['images']} images of {about['resolution']} pixels a side and the ResNets of the recipe's demo "
        f"(torch {about['torch']}, transformers {about['transformers']}). Bare calls make the logits of all tokens, ours of "
        "those that are learned, and so not of prompts: a ratio may be below 1. DistiLLM's validations, one in a hundred steps "
        "by default, are not in it."
    )
    return "\n".join([*lines, "", how])


def cached_teacher(path: Path) -> str:
    """What benchmarks/cached_teacher.py measured, and how to read it."""
    about, lines = _ratios(path)
    stored = json.loads(path.read_text(encoding="utf-8"))["storage"]
    sizes = "; ".join(f"k = {c['k']}: {c['bytes_per_token']:.0f} bytes, {c['of_fp16']:.1%}" for c in stored["caches"])
    teacher, student = (about["parameters"][name] / 1e6 for name in ("teacher", "student"))
    how = (
        f"A step of distillation on text, batch {about['batch']} of {about['block_size']} tokens: a teacher of {teacher:.1f} "
        f"million parameters, a student of {student:.1f}, both with random weights, {about['vocabulary']:,} tokens; "
        f"{about['threads']} CPU thread, torch {about['torch']}, in turns. On disk a token takes, "
        f"and of all its logits in fp16 that is, {sizes}."
    )
    return "\n".join([*lines, "", how])


def curve(path: Path) -> str:
    """What benchmarks/steps_vs_quality.py measured, and how to read it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows, first = data["rows"], data["rows"][0]
    sizes = list(dict.fromkeys(n for row in rows for n in row["noisy"]))
    head = ["model", "steps", "by formula", "measured", *(f"right, told apart at N = {n}" for n in sizes)]
    cells = [
        [row["model"], str(row["steps"]), f"{row['exact']:.4f}", f"{row['measured']:.4f}"]
        + [
            "{holds the truth:.1%}, {told apart:.1%}".format_map(row["noisy"][n]) if n in row["noisy"] else ""
            for n in sizes
        ]
        for row in rows
    ]
    how = (
        f"Squared W2 to the data, {data['protocol']['data']}. Right: the share of {data['protocol']['repeats']} repetitions in "
        f"which the 95 % interval of the difference to {first['model']}, {first['steps']} steps holds the true one. Told "
        "apart: in which it does not hold 0."
    )
    return "\n".join([*aligned(head, cells), "", how])


BLOCKS = (
    Block("README.md", "results", SWEEP, results_table),
    Block("README.md", "step cost", RESULTS / "step_cost.json", step_cost),
    Block("docs/demo.md", "three seeds", RESULTS / "demo_lcm_lora.json", results_table),
    Block("docs/demo.md", "ladders", RESULTS / "demo_progressive.json", results_table),
    Block("docs/demo.md", "long ladder", RESULTS / "demo_progressive_long.json", results_table),
    Block("docs/demo.md", "adversarial", RESULTS / "demo_ladd.json", results_table),
    Block("docs/demo.md", "adversarial, longer", RESULTS / "demo_ladd_long.json", results_table),
    Block("docs/demo.md", "adversarial adapter", RESULTS / "demo_ladd_lora.json", results_table),
    Block("docs/demo.md", "adversarial, in pixels", RESULTS / "demo_add.json", results_table),
    Block("docs/guides/how_many_steps.md", "curve", RESULTS / "steps_vs_quality.json", curve),
    Block("docs/guides/distilling_language_models.md", "kd cost", RESULTS / "kd_cost.json", kd_cost),
    Block("docs/guides/distilling_language_models.md", "kd step", RESULTS / "kd_step.json", kd_step),
    Block("docs/guides/distilling_language_models.md", "kd methods", RESULTS / "kd_step.json", kd_methods),
    Block("docs/guides/distilling_language_models.md", "gkd step", RESULTS / "gkd_step.json", gkd_step),
    Block("docs/guides/distilling_language_models.md", "language students", RESULTS / "lm_kd.json", language_students),
    Block("docs/guides/distilling_language_models.md", "own text", RESULTS / "gkd.json", own_text_students),
    Block("docs/guides/distilling_language_models.md", "distilbert", RESULTS / "distilbert.json", bert_students),
    Block("docs/guides/distilling_language_models.md", "tinybert", RESULTS / "tinybert.json", bert_students),
    Block("docs/guides/distilling_language_models.md", "image students", RESULTS / "hinton.json", image_students),
    Block(
        "docs/guides/distilling_language_models.md", "cached teacher", RESULTS / "cached_teacher.json", cached_teacher
    ),
    Block("docs/guides/how_many_steps.md", "metric cost", RESULTS / "metric_cost.json", metric_cost),
)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="a results.json of stepdistill bench to keep as the README's first")
    take = parser.parse_args(args).take
    if take is not None:  # without the numbers of each image, which are many
        replace(Results.read(take), samples={}).write(ROOT / SWEEP)
    for block in BLOCKS:
        block.write(ROOT)


if __name__ == "__main__":
    main()
