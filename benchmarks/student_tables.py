"""Tables of students beside their control group, over several seeds: what language_, image_ and bert_students.py wrote."""

import json
from pathlib import Path
from typing import Any

from stepdistill.bench.table import aligned

AGAINST = ("minus control", "95 % interval", "beyond the seeds' noise")


def own_text_students(path: Path) -> str:
    """GKD's results, and in the same table those of the other recipes on a student's own text that lie beside them.

    ValueError for other controls: then the numbers are no comparison.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    data["variants"] = {f"gkd, {name}": row for name, row in data["variants"].items()}
    for name in ("distillm", "minillm"):
        file = path.with_name(f"{name}.json")
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["control"] != data["control"]:
                raise ValueError(f"expected one control group in {path} and {file}, got two; measure both anew")
            data["variants"] |= {name: found["variants"]["student"]}
            data["protocol"]["recipe"] += f".py`, `{name}"
    return _language_students(data)


def language_students(path: Path) -> str:
    """What benchmarks/language_students.py measured, and how to read it."""
    return _language_students(json.loads(path.read_text(encoding="utf-8")))


def _language_students(data: dict[str, Any]) -> str:
    about, plain, sizes = data["protocol"], data["control"], data["parameters"]
    head = ["model", "parameters", "perplexity", *AGAINST, "gap closed"]
    student = f"{sizes['student']:,}"
    cells = [
        ["teacher", f"{sizes['teacher']:,}", f"{data['teacher']['perplexity']:.2f}", *[""] * 4],
        ["control", student, mean_told(plain["perplexity"], ".2f"), *[""] * 4],
    ]
    for name, row in data["variants"].items():
        found = [mean_told(row["perplexity"], ".2f"), *_difference(row["perplexity"]["minus_control"], "+.2f")]
        cells.append([name.replace("_", " "), student, *found, mean_told(row["gap_closed"], ".1%")])
    if "own_text_reverse_kl" in plain:  # on a student's own text
        head += ["KL on own text", *AGAINST]
        owns = [plain["own_text_reverse_kl"], *(row["own_text_reverse_kl"] for row in data["variants"].values())]
        cells[0] += [""] * 4
        for line, own in zip(cells[1:], owns, strict=True):
            told = _difference(own["minus_control"], "+.3f") if "minus_control" in own else [""] * 3
            line += [mean_told(own, ".3f"), *told]
    measured = data["measured"]
    window = (
        "of the answers" if measured["stride"] is None else f"window {measured['window']}, stride {measured['stride']}"
    )
    first = f"{about['sft_steps']} steps of fine-tuning and " if about["sft_steps"] else ""
    how = (
        f"`recipes/{about['recipe']}.py`, seeds {', '.join(map(str, about['seeds']))}: means and standard deviations. Control: "
        f"the student without a teacher, on the same batches from the same first weights, {first}{about['steps']} steps of "
        f"{about['batch']} blocks at a rate of {about['learning_rate']:g}, {about['tokens_seen']:,} tokens at most. "
        "A difference is taken within each seed, with Student's interval; beyond the noise: it does not hold 0. Perplexity of "
        f"{measured['tokens']:,} held-out tokens, {window}; KL from the teacher in nats a token (torch "
        f"{data['environment']['torch']}, accelerator {data['environment']['accelerator']})."
    )
    return "\n".join([*aligned(head, cells), "", how])


def mean_told(found: dict[str, Any], spec: str) -> str:
    """With its standard deviation, where there is one."""
    if found["mean"] is None:
        return "none"
    return f"{found['mean']:{spec}}" + ("" if found["std"] is None else f" ± {found['std']:{spec}}")


def _difference(found: dict[str, Any], spec: str) -> list[str]:
    """The mean difference, its interval, and whether that leaves 0 out."""
    if found["interval"] is None:
        return [f"{found['mean']:{spec}}", "", "one seed"]
    low, high = found["interval"]
    told = "yes" if found["exceeds_seed_noise"] else "no"
    return [f"{found['mean']:{spec}}", f"[{low:{spec}}, {high:{spec}}]", told]


def image_students(path: Path) -> str:
    """What benchmarks/image_students.py measured, and how to read it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    about, size, seconds = data["protocol"], data["parameters"], data["latency_ms"]

    def line(name: str, whose: str, found: str, *rest: str) -> list[str]:
        return [name, f"{size[whose]:,}", f"{seconds[whose]:.2f}", found, *(rest or ("",) * 4)]

    cells = [
        line("teacher", "teacher", f"{data['teacher']:.1%}"),
        line("control", "student", mean_told(data["control"], ".1%")),
    ]
    for name, row in data["groups"].items():
        told = _difference(row["minus_control"], "+.1%")
        cells.append(line(name, "student", mean_told(row, ".1%"), *told, mean_told(row["gap_closed"], ".0%")))
    soft, hard = about["weights"]
    seen, environment = data["trained_on"], data["environment"]
    how = (
        f"`recipes/hinton.py`, {about['seeds']} seeds: means and standard deviations, on {data['test_images']:,} test images. "
        f"The teacher was trained on {seen['teacher']:,} images for {about['teacher_steps']} steps, the students on "
        f"{seen['student']:,} of them for {about['steps']} steps of {about['batch']}, at a rate of {about['learning_rate']:g}; "
        f"control: labels alone, from the same first weights; the rest {soft:g} of the teacher's answers at temperature T and "
        f"{hard:g} of the labels. A difference is taken within each seed, with Student's interval; beyond the noise: it does "
        f"not hold 0. Milliseconds of one image, in turns (torch {environment['torch']}, accelerator "
        f"{environment['accelerator']})."
    )
    head = ["model", "parameters", "ms an image", "accuracy", *AGAINST, "gap closed"]
    return "\n".join([*aligned(head, cells), "", how])


BERT_NAMES = {
    "before": "student before training",
    "random": "student from random weights",
    "student": "student",
    "control": "control",
    "teacher": "teacher",
}
BERT_MEASURES = {"perplexity": ("perplexity at masked words", ".2f"), "accuracy": ("accuracy", ".1%")}


def bert_students(path: Path) -> str:
    """What benchmarks/bert_students.py measured, and how to read it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    models, size = data["models"], data["parameters"]
    measures = [name for name in BERT_MEASURES if name in models["student"]]
    head = ["model", "parameters"]
    for measure in measures:
        head += [BERT_MEASURES[measure][0], *AGAINST]
    cells = []
    for name in sorted(models, key=["teacher", "before", "control", "random", "student"].index):
        line = [BERT_NAMES[name], f"{size.get(name, size['student']):,}"]
        for measure in measures:
            found, spec = models[name][measure], BERT_MEASURES[measure][1]
            told = _difference(found["minus_control"], f"+{spec}") if "minus_control" in found else [""] * 3
            line += [mean_told(found, spec), *told]
        cells.append([*line, mean_told(data["gap_closed"], ".1%") if name == "student" else ""])
    return "\n".join([*aligned([*head, "gap closed"], cells), "", _how_berts(data, measures[0])])


def _how_berts(data: dict[str, Any], gap: str) -> str:
    about, measured, environment = data["protocol"], data["measured"], data["environment"]
    steps = ", ".join(f"{name} {count}" for name, count in about["steps"].items() if count)
    if "test_texts" in measured:
        on = (
            f"{measured['test_texts']:,} held-out texts of {len(measured['classes'])} classes, {measured['trained_on']:,} to "
            "train on"
        )
    else:
        on = (
            f"{measured['masked_words']:,} masked words of {measured['tokens']:,} held-out tokens in blocks of "
            f"{measured['window']}, read {measured['masks']} times with other words masked"
        )
    return (
        f"`recipes/{about['recipe']}.py`, seeds {', '.join(map(str, about['seeds']))}, each with a teacher, a control and a "
        f"student of its own: means and standard deviations, on {on}. Control: the student's first weights, as many steps "
        f"without a teacher. Steps of {about['batch']} at a rate of {about['learning_rate']:g}: {steps}. A difference is taken "
        "within each seed, with Student's interval; beyond the noise: it does not hold 0. Gap in "
        f"{gap} between control and teacher (torch "
        f"{environment['torch']}, accelerator {environment['accelerator']})."
    )
