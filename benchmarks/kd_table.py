"""One table of all methods of classic distillation, gathered from the results files that are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from seed_spread import spread
from student_tables import BERT_MEASURES, mean_told

from stepdistill.bench.table import aligned

METHODS = {  # by recipe, whose name its results file has
    "lm_kd": "on given text",
    "gkd": "GKD",
    "distillm": "DistiLLM",
    "minillm": "MiniLLM",
    "distilbert": "DistilBERT",
    "tinybert": "TinyBERT",
    "hinton": "Hinton et al.",
}
HEAD = ("method", "recipe", "measure", "teacher", "control", "student", "gap closed", "beyond the seeds' noise")
COST = "a step over its bare calls"
Line = list[str]  # variant, measure, teacher, control, student, gap closed, beyond the noise


def kd_methods(path: Path) -> str:
    """The table; a method without results has no row, and is named below.

    Args:
        path: of what benchmarks/kd_step.py measured; results of the recipes lie beside it.
    """
    costs, cells, seeds, missing = step_costs(path), [], [], []
    for recipe, method in METHODS.items():
        file = path.with_name(f"{recipe}.json")
        if not file.is_file():
            missing.append(f"{method} (`{file.name}`)")
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        asked = data["protocol"]["seeds"]
        seeds.append(f"{recipe} {asked if isinstance(asked, int) else len(asked)}")
        for variant, *rest in READERS.get(recipe, _language)(data):
            name = f"{method}, {variant}" if variant else method
            cells.append([name, f"`{recipe}`", *rest, costs.get(recipe, "")])
    how = (
        "Each recipe by its demo's options, from the results file of its name: teachers, controls and data may differ, so that "
        "a student is to be compared with its own control, the same student without a teacher. Means and standard deviations "
        f"over seeds ({', '.join(seeds) or 'none'}). Gap closed: between control and teacher; beyond the noise: Student's "
        "interval of the difference to the control, taken within each seed, does not hold 0. KL on own text: from the "
        "teacher, in nats a token that the student wrote; a student that is its teacher has 0. A step over its bare calls: CPU "
        "time of ours by that of the networks alone, for each kind of step."
    )
    how += f" Not measured yet: {', '.join(missing)}." if missing else ""
    return "\n".join([*aligned([*HEAD, COST], cells), "", how])


def step_costs(path: Path) -> dict[str, str]:
    """The ratios of each recipe's kinds of steps, as they are told."""
    found: dict[str, list[str]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        found.setdefault(row["recipe"], []).append(f"{row['ratio']:.2f} {row['kind']}".strip())
    return {recipe: "; ".join(told) for recipe, told in found.items()}


def beyond_noise(minus_control: dict[str, Any], less_is_better: bool) -> str:
    """Whether the difference to the control is one, and where it is a loss."""
    if minus_control["interval"] is None:
        return "one seed"
    if not minus_control["exceeds_seed_noise"]:
        return "no"
    return "yes" if (minus_control["mean"] < 0.0) == less_is_better else "yes, worse"


def _language(data: dict[str, Any]) -> Iterator[Line]:
    """What benchmarks/language_students.py writes: perplexity, and of a recipe on a student's own text the KL there."""
    plain, best = data["control"], data["teacher"]["perplexity"]
    for name, row in data["variants"].items():
        variant = "" if name == "student" else name.replace("_", " ")
        gap = mean_told(row["gap_closed"], ".0%")
        yield [variant, "perplexity", f"{best:.2f}", *_against(plain, row, "perplexity", ".2f", gap)]
        if (kl := "own_text_reverse_kl") in row:
            pairs = zip(plain[kl]["values"], row[kl]["values"], strict=True)
            gap = mean_told(spread([(control - student) / control for control, student in pairs]), ".0%")
            yield [variant, "KL on own text", "0", *_against(plain, row, kl, ".3f", gap)]


def _against(plain: dict[str, Any], row: dict[str, Any], measure: str, spec: str, gap: str) -> Line:
    """Control, student, gap closed and verdict of a measure of which less is better."""
    told = [mean_told(found[measure], spec) for found in (plain, row)]
    return [*told, gap, beyond_noise(row[measure]["minus_control"], True)]


def _berts(data: dict[str, Any]) -> Iterator[Line]:
    """What benchmarks/bert_students.py writes: the measure that the share of the gap is of."""
    models = data["models"]
    measure = next(name for name in BERT_MEASURES if name in models["student"])
    label, spec = BERT_MEASURES[measure]
    told = [mean_told(models[name][measure], spec) for name in ("teacher", "control", "student")]
    verdict = beyond_noise(models["student"][measure]["minus_control"], measure == "perplexity")
    yield ["", label, *told, mean_told(data["gap_closed"], ".0%"), verdict]


def _images(data: dict[str, Any]) -> Iterator[Line]:
    """What benchmarks/image_students.py writes."""
    for name, row in data["groups"].items():
        told = [f"{data['teacher']:.1%}", mean_told(data["control"], ".1%"), mean_told(row, ".1%")]
        gap = mean_told(row["gap_closed"], ".0%")
        yield [name, "accuracy", *told, gap, beyond_noise(row["minus_control"], False)]


READERS: dict[str, Callable[[dict[str, Any]], Iterator[Line]]] = {
    "distilbert": _berts,
    "tinybert": _berts,
    "hinton": _images,
}
