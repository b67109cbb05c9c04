"""The end of a text classifier's distillation: accuracy of teacher, control and student side by side, the student's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.labelled_text import TextRows
from ..kd.encoders import Encoders
from ..kd.networks import sizes
from ..kd.text_classifier import TextClassifier, accuracy
from .classifier import gap_closed
from .transformer import Report, export_network

NAMES = {
    "teacher": "teacher, fine-tuned",
    "control": "student without teacher, as many steps",
    "student": "student, distilled",
}


def finish(
    folder: str | Path,
    encoders: Encoders,
    models: Mapping[str, TextClassifier],
    test: TextRows,
    steps: Mapping[str, int],
    trained_on: int,
    layers: tuple[int, ...],
) -> dict[str, Any]:
    """Measures all models, exports the student and prints the table; returns the results.

    Args:
        models: "teacher" and "student", and "control" where there is one.
        test: held out.
        steps: of each stage by name.
        trained_on: how many labelled texts there were.
        layers: the layer map.
    """
    found = {name: accuracy(models[name], test) for name in NAMES if name in models}
    results: dict[str, Any] = {
        "accuracy": found, "test_texts": len(test), "trained_on": trained_on, "classes": list(encoders.classes),
        "steps": dict(steps), "layers": list(layers), "parameters": sizes(models),
    }  # fmt: skip
    if "control" in found:
        results["gap_closed"] = gap_closed(found["control"], found["student"], found["teacher"])
    table = _table(results)
    teacher, student = encoders.pair.teacher_config.path, encoders.student_config.path
    details = [
        f"teacher: {teacher}" + (f", fine-tuned {encoders.fine_tuned}" if encoders.fine_tuned else ""),
        f"layers of the teacher that its own learned from, embeddings first: {', '.join(map(str, layers))}",
        f"classes: {', '.join(encoders.classes)}",
        f"tokenizer: {len(encoders.tokenizer):,} tokens",
    ]
    report = Report(
        "text-classification",
        "tinybert",
        "Distilled text classifier",
        student,
        teacher,
        results,
        details,
        {"Results": table},
    )
    ids = torch.tensor([test.rows[0].ids])
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    export_network(folder, models["student"], encoders.tokenizer, probe, report)
    print(f"{table}\nthe student is in {folder}")
    return results


def _table(results: Mapping[str, Any]) -> str:
    rows = ["| model | parameters | accuracy |", "|---|---|---|"]
    for name, value in results["accuracy"].items():
        spread = math.sqrt(value * (1.0 - value) / results["test_texts"])
        rows.append(f"| {NAMES[name]} | {results['parameters'][name]:,} | {value:.1%} +- {100 * spread:.1f} |")
    stages = ", ".join(f"{name} {count}" for name, count in results["steps"].items())
    lines = [
        *rows, "",
        f"{results['test_texts']:,} held-out texts of {len(results['classes'])} classes (with the standard error of so many), "
        f"{results['trained_on']:,} to train on. Steps: {stages}.",
    ]  # fmt: skip
    if "gap_closed" in results:
        gap = results["gap_closed"]
        told = "is none: the teacher is no better than the control" if gap is None else f"closed: {gap:.1%}"
        lines += [f"Gap between control and teacher {told}."]
    return "\n".join(lines)
