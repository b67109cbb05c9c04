"""The end of a masked language model's distillation: models side by side at masked words, the student's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..kd.evaluation import gap_closed, side_by_side
from ..kd.masked import MaskedLM
from ..kd.masked_evaluation import MaskedExamination, Score
from ..kd.networks import sizes
from ..kd.pair import Pair
from .card import SAMPLES
from .config import NetworkExportConfig
from .hub import push
from .language_model import probe
from .transformer import Report, export_network

TITLE, TASK = "Distilled masked language model", "fill-mask"
ORDER = ("teacher", "random", "control", "student")
NAMES = {
    "before": "student before training",
    "teacher": "teacher",
    "random": "student from random weights, distilled",
    "control": "student without teacher, equal tokens",
    "student": "student, distilled",
}


def writer(exam: MaskedExamination, student: MaskedLM, folder: str | Path) -> Callable[[int], None]:
    """What `Trainer.fit` calls at validation: the student's guesses go to samples/STEP.txt."""

    def write(step: int) -> None:
        place = Path(folder) / SAMPLES
        place.mkdir(parents=True, exist_ok=True)
        pairs = zip(exam.prompts, exam.guesses(student), strict=True)
        (place / f"{step:06d}.txt").write_text("".join(f"> {p}\n{text}\n\n" for p, text in pairs), encoding="utf-8")

    return write


def finish(
    folder: str | Path,
    pair: Pair[MaskedLM],
    exam: MaskedExamination,
    models: Mapping[str, MaskedLM],
    layers: Sequence[int],
    before: Mapping[str, Score],
    export: NetworkExportConfig | None = None,
) -> dict[str, Any]:
    """Measures all models, exports the student and prints the table; returns the results.

    Args:
        models: "teacher" and "student", and "control" and "random" where there are such.
        layers: of the teacher, which the student is made of.
        before: the student's score before its training, as "before".
        export: in which precision the student is written, and where it is uploaded.
    """
    found = {**before, **exam.scores({name: models[name] for name in ORDER if name in models})}
    results: dict[str, Any] = {
        "perplexity": {name: s.perplexity for name, s in found.items()},
        "accuracy": {name: s.accuracy for name, s in found.items()},
        "masked_words": found["student"].count, "tokens": exam.tokens, "window": exam.window, "masks": len(exam.looks),
        "layers": list(layers), "parameters": sizes(models),
    }  # fmt: skip
    if "control" in found:
        gap = gap_closed(*(found[name].perplexity for name in ("control", "student", "teacher")))
        results["gap_closed"] = None if math.isnan(gap) else gap
    table = _table(found, results)
    sections = {"Results": table}
    if exam.prompts:
        guessed = {name: exam.guesses(models[name]) for name in ORDER if name in models}
        sections["What they guess"] = side_by_side(exam.prompts, guessed)
    teacher = pair.teacher_config.path
    details = [
        f"the teacher has {results['parameters']['teacher']:,} parameters and {models['teacher'].depth} layers",
        *details_of(layers, pair.tokenizer),
    ]
    report = Report(TASK, "distilbert", TITLE, teacher, teacher, results, details, sections)
    export = export or NetworkExportConfig()
    export_network(folder, models["student"], pair.tokenizer, probe(pair.tokenizer), report, export.dtype)
    address = push(folder, export)
    print(f"{table}\nthe student is in {folder}{f', and at {address}' if address else ''}")
    return results


def details_of(layers: Sequence[int], tokenizer: Any) -> list[str]:
    """Lines of a student's card: what it was made of."""
    return [
        f"begun with its layers {', '.join(map(str, layers))} (from 0), its embeddings and its head",
        f"tokenizer: {len(tokenizer):,} tokens",
    ]


def _table(found: Mapping[str, Score], results: Mapping[str, Any]) -> str:
    parameters = results["parameters"]
    rows = ["| model | parameters | perplexity at masked words | guessed right |", "|---|---|---|---|"]
    for name, s in found.items():
        size = parameters.get(name, parameters["student"])
        rows.append(f"| {NAMES[name]} | {size:,} | {s.perplexity:.2f} | {s.accuracy:.1%} |")
    told = (
        f"{results['masked_words']:,} masked words of {results['tokens']:,} held-out tokens in blocks of {results['window']}, "
        f"read {results['masks']} times with other words masked; the same words for all."
    )
    lines = [*rows, "", told]
    if "gap_closed" in results:
        gap = results["gap_closed"]
        said = "is none: the teacher is no better than the control" if gap is None else f"closed: {gap:.1%}"
        lines += [f"Gap in perplexity between control and teacher {said}."]
    return "\n".join(lines)
