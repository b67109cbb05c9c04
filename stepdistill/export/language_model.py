"""The end of a language model's distillation: perplexities side by side, what each model writes, the student's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..kd.evaluation import Examination, gap_closed, side_by_side
from ..kd.networks import CausalLM, sizes
from ..kd.pair import Pair
from .card import SAMPLES
from .config import NetworkExportConfig
from .hub import push
from .transformer import Report, export_network

TITLES = {
    "lm_kd": "Distilled language model",
    "gkd": "Language model distilled on its own text",
    "minillm": "Language model distilled by policy gradients",
    "distillm": "Language model distilled on text and its own, replayed",
}
ORDER = ("teacher", "control", "student")


def writer(exam: Examination, student: CausalLM, folder: str | Path) -> Callable[[int], None]:
    """What `Trainer.fit` calls at validation: the student's continuations go to samples/STEP.txt."""

    def write(step: int) -> None:
        place = Path(folder) / SAMPLES
        place.mkdir(parents=True, exist_ok=True)
        pairs = zip(exam.prompts, exam.continuations(student), strict=True)
        (place / f"{step:06d}.txt").write_text("".join(f"> {p}\n{text}\n\n" for p, text in pairs), encoding="utf-8")

    return write


def finish(
    folder: str | Path,
    method: str,
    pair: Pair[CausalLM],
    exam: Examination,
    models: Mapping[str, CausalLM],
    before: Mapping[str, float] | None = None,
    own_text: Mapping[str, float] | None = None,
    export: NetworkExportConfig | None = None,
) -> dict[str, Any]:
    """Measures teacher, control and student, exports the student and prints the table; returns the results.

    Args:
        models: "student", and "teacher" and "control" where they are measured.
        before: perplexities of an earlier moment, by name.
        own_text: how far control and student are from the teacher on what they write themselves, where that was measured.
        export: in which precision the student is written, and where it is uploaded.
    """
    found = {**(before or {}), **exam.perplexities({name: models[name] for name in ORDER if name in models})}
    results: dict[str, Any] = {"perplexity": found, "tokens": exam.tokens, "stride": exam.stride, "window": pair.window}
    if "control" in found and "teacher" in found:
        gap = gap_closed(found["control"], found["student"], found["teacher"])
        results["gap_closed"] = None if math.isnan(gap) else gap
    if own_text:
        results["own_text_reverse_kl"] = dict(own_text)
    parameters = sizes(models)
    table = _table(found, parameters, results)
    written = {name: exam.continuations(models[name]) for name in ORDER if name in models}
    sections = {"Results": table}
    if exam.prompts:
        sections["What they write"] = side_by_side(exam.prompts, written)
    teacher, base = pair.teacher_config, (pair.student_config or pair.teacher_config).path
    details = [f"tokenizer: {len(pair.tokenizer):,} tokens"]
    if "teacher" in parameters:
        details.insert(0, f"the teacher has {parameters['teacher']:,} parameters")
    report = Report("text-generation", method, TITLES[method], base, teacher.path, results, details, sections)
    export = export or NetworkExportConfig()
    export_network(folder, models["student"], pair.tokenizer, probe(pair.tokenizer), report, export.dtype)
    address = push(folder, export)
    print(f"{table}\nthe student is in {folder}{f', and at {address}' if address else ''}")
    return results


def probe(tokenizer: Any) -> dict[str, torch.Tensor]:
    """What a language model is compared on."""
    ids = torch.arange(min(8, len(tokenizer)))[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _table(found: Mapping[str, float], parameters: Mapping[str, int], results: Mapping[str, Any]) -> str:
    rows = ["| model | parameters | perplexity |", "|---|---|---|"]
    for name, value in found.items():
        rows.append(f"| {NAMES[name]} | {parameters.get(name, parameters['student']):,} | {value:.2f} |")
    how = "of the answers" if results["stride"] is None else f"window {results['window']}, stride {results['stride']}"
    lines = [*rows, "", f"On {results['tokens']:,} held-out tokens, {how}."] if found else []
    if "own_text_reverse_kl" in results:
        told = ", ".join(f"{NAMES[name]} {value:.3f}" for name, value in results["own_text_reverse_kl"].items())
        lines += [f"KL from the teacher on their own text, nats a token: {told}."]
    if "gap_closed" in results:
        gap = results["gap_closed"]
        told = "is none: the teacher is no better than the control" if gap is None else f"closed: {gap:.1%}"
        lines += [f"Gap between control and teacher {told}."]
    return "\n".join(lines)


NAMES = {
    "before": "student before training",
    "teacher": "teacher",
    "control": "student without teacher, equal steps",
    "student": "student, distilled",
}
