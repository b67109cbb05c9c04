"""The table of all methods: what each kind of results file says, in its place, and nothing of those that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bert_students
import image_students
import kd_table
import language_students
import pytest
from seed_spread import paired

SEEDS = [0, 1, 2]


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """Costs, as benchmarks/kd_step.py writes them."""
    rows = [
        {"recipe": "gkd", "kind": "data's text", "ratio": 1.256}, {"recipe": "minillm", "kind": "", "ratio": 1.5},
        {"recipe": "gkd", "kind": "own text", "ratio": 0.97},
    ]  # fmt: skip
    write(tmp_path / "kd_step.json", {"rows": rows})
    return tmp_path / "kd_step.json"


def language(recipe: str, students: dict[str, list[float]], own: list[float] | None = None) -> dict[str, Any]:
    """Of three seeds; the teacher has perplexity 10, controls 30, and a KL of 2 on their own text."""
    sizes = {"teacher": 7000, "control": 300}
    kl = {"own_text_reverse_kl": {"control": 2.0}} if own else {}
    controls = [{"perplexity": {"control": 30.0, "teacher": 10.0}, "parameters": sizes, **kl} for _ in SEEDS]
    groups = {
        name: [
            {"perplexity": {"student": value, "teacher": 10.0}, "tokens": 9, "window": 8, "stride": 4}
            | ({"own_text_reverse_kl": {"student": own[i]}} if own else {})
            for i, value in enumerate(values)
        ]
        for name, values in students.items()
    }
    return {**language_students.collected(controls, groups), "protocol": {"recipe": recipe, "seeds": SEEDS}}


def berts(student: list[float], perplexity: list[float] | None = None) -> dict[str, Any]:
    """Of three seeds: accuracies, of teacher .9 and control .5, and for DistilBERT perplexities, 10 and 30."""
    runs: list[dict[str, Any]] = []
    for i in range(len(SEEDS)):
        found: dict[str, Any] = {
            "accuracy": {"teacher": 0.9, "control": 0.5, "student": student[i]}, "gap_closed": (student[i] - 0.5) / 0.4,
            "parameters": {"teacher": 7000, "student": 300},
        }  # fmt: skip
        if perplexity is not None:
            found["perplexity"] = {"teacher": 10.0, "control": 30.0, "student": perplexity[i]}
            found["gap_closed"] = (30.0 - perplexity[i]) / 20.0
        runs.append(found)
    return {**bert_students.collected(runs), "protocol": {"seeds": SEEDS}}


def images() -> dict[str, Any]:
    accuracy = {
        "labels alone": [0.3, 0.34, 0.32, 0.31],
        "T = 1": [0.31, 0.33, 0.33, 0.30],
        "T = 4": [0.5, 0.54, 0.52, 0.51],
    }
    found = {
        "teacher_accuracy": 0.99, "accuracy": accuracy, "parameters": {}, "test_images": 50, "trained_on": {}, "latency_ms": {},
    }  # fmt: skip
    return {**image_students.collected(found), "protocol": {"seeds": 4}}


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.split("\n") if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_file_has_its_rows_in_order(step: Path) -> None:
    near = step.with_name
    write(near("hinton.json"), images())
    write(near("tinybert.json"), berts([0.7, 0.74, 0.72]))
    write(near("distilbert.json"), berts([0.7, 0.7, 0.7], [20.0, 22.0, 21.0]))
    write(near("minillm.json"), language("minillm", {"student": [30.0, 31.0, 29.0]}, [0.5, 0.6, 0.4]))
    write(near("gkd.json"), language("gkd", {"half_its_own": [31.0, 31.1, 31.2]}, [2.5, 2.6, 2.7]))
    write(near("lm_kd.json"), language("lm_kd", {"forward_kl": [15.0, 16.0, 14.0], "jsd": [20.0, 20.0, 20.0]}))
    text = kd_table.kd_methods(step)
    gkd, one = "1.26 data's text; 0.97 own text", "1.50"
    assert rows(text) == [
        ["on given text, forward kl", "`lm_kd`", "perplexity", "10.00", "30.00 ± 0.00", "15.00 ± 1.00", "75% ± 5%", "yes", ""],
        ["on given text, jsd", "`lm_kd`", "perplexity", "10.00", "30.00 ± 0.00", "20.00 ± 0.00", "50% ± 0%", "yes", ""],
        ["GKD, half its own", "`gkd`", "perplexity", "10.00", "30.00 ± 0.00", "31.10 ± 0.10", "-6% ± 0%", "yes, worse", gkd],
        ["GKD, half its own", "`gkd`", "KL on own text", "0", "2.000 ± 0.000", "2.600 ± 0.100", "-30% ± 5%", "yes, worse", gkd],
        ["MiniLLM", "`minillm`", "perplexity", "10.00", "30.00 ± 0.00", "30.00 ± 1.00", "0% ± 5%", "no", one],
        ["MiniLLM", "`minillm`", "KL on own text", "0", "2.000 ± 0.000", "0.500 ± 0.100", "75% ± 5%", "yes", one],
        ["DistilBERT", "`distilbert`", "perplexity at masked words", "10.00 ± 0.00", "30.00 ± 0.00", "21.00 ± 1.00",
         "45% ± 5%", "yes", ""],
        ["TinyBERT", "`tinybert`", "accuracy", "90.0% ± 0.0%", "50.0% ± 0.0%", "72.0% ± 2.0%", "55% ± 5%", "yes", ""],
        ["Hinton et al., T = 1", "`hinton`", "accuracy", "99.0%", "31.8% ± 1.7%", "31.8% ± 1.5%", "-0% ± 2%", "no", ""],
        ["Hinton et al., T = 4", "`hinton`", "accuracy", "99.0%", "31.8% ± 1.7%", "51.8% ± 1.7%", "30% ± 1%", "yes", ""],
    ]  # fmt: skip
    assert "over seeds (lm_kd 3, gkd 3, minillm 3, distilbert 3, tinybert 3, hinton 4)" in text
    assert "Not measured yet: DistiLLM (`distillm.json`)." in text


def test_what_is_there_is_all_that_is_told(step: Path) -> None:
    text = kd_table.kd_methods(step)
    assert rows(text) == [] and "over seeds (none)" in text
    assert all(f"(`{recipe}.json`)" in text for recipe in kd_table.METHODS)
    for recipe in kd_table.METHODS:
        kind = {"distilbert": berts([0.5] * 3, [9.0] * 3), "tinybert": berts([0.5] * 3), "hinton": images()}
        write(step.with_name(f"{recipe}.json"), kind.get(recipe) or language(recipe, {"student": [20.0] * 3}))
    text = kd_table.kd_methods(step)
    assert "Not measured" not in text and {row[1] for row in rows(text)} == {f"`{name}`" for name in kd_table.METHODS}


@pytest.mark.parametrize(
    ("ours", "less_is_better", "wanted"),
    [
        ([1.0], True, "one seed"), ([1.0, 1.1, 1.2], True, "yes, worse"), ([1.0, 1.1, 1.2], False, "yes"),
        ([-1.0, -1.1, -1.2], True, "yes"), ([-1.0, -1.1, -1.2], False, "yes, worse"), ([-1.0, 1.0, 0.5], True, "no"),
    ],
)  # fmt: skip
def test_a_loss_is_no_gain(ours: list[float], less_is_better: bool, wanted: str) -> None:
    assert kd_table.beyond_noise(paired(ours, [0.0] * len(ours)), less_is_better) == wanted


def test_a_gap_that_is_not_known_is_told(step: Path) -> None:
    """Where a seed's teacher is no better than its control."""
    data = berts([0.7] * 3)
    data["gap_closed"] = {"mean": None, "std": None, "values": [0.5, None, 0.5]}
    write(step.with_name("tinybert.json"), data)
    assert rows(kd_table.kd_methods(step))[0][6] == "none"
