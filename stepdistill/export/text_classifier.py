"""The end of a text classifier's distillation: accuracy of teacher, control and student side by side, the student's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.labelled_text import TextRows
from ..families.loading import is_local
from ..kd.encoders import Encoders
from ..kd.networks import sizes
from ..kd.text_classifier import TextClassifier, accuracy
from .classifier import gap_closed
from .config import NetworkExportConfig
from .hub import push
from .language_model import probe
from .transformer import Report, export_network

TITLE, TASK = "Distilled text classifier", "text-classification"
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
    export: NetworkExportConfig | None = None,
) -> dict[str, Any]:
    """Measures all models, exports the student and prints the table; returns the results.

    Args:
        models: "teacher" and "student", and "control" where there is one.
        test: held out.
        steps: of each stage by name.
        trained_on: how many labelled texts there were.
        layers: the layer map.
        export: in which precision the student is written, and where it is uploaded.
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
    tuned = encoders.fine_tuned
    details = [
        f"the teacher has {results['parameters']['teacher']:,} parameters",
        *([f"the teacher fine-tuned: {tuned}"] if tuned and not is_local(tuned) else []),  # cards name no place here
        f"layers of the teacher that its own learned from, embeddings first: {', '.join(map(str, layers))}",
        *details_of(encoders.classes, encoders.tokenizer),
    ]
    report = Report(TASK, "tinybert", TITLE, student, teacher, results, details, {"Results": table})
    export = export or NetworkExportConfig()
    export_network(folder, models["student"], encoders.tokenizer, probe(encoders.tokenizer), report, export.dtype)
    address = push(folder, export)
    print(f"{table}\nthe student is in {folder}{f', and at {address}' if address else ''}")
    return results


def details_of(classes: Sequence[str], tokenizer: Any) -> list[str]:
    """Lines of an encoder's card; one of no classes is no classifier."""
    return [*([f"classes: {', '.join(classes)}"] if classes else []), f"tokenizer: {len(tokenizer):,} tokens"]


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
