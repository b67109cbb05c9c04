"""Students of BERT layouts over seeds: the runs that are asked for, what their numbers say, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bert_students
import pytest
import student_tables
from recipe_runs import load_recipe

from stepdistill.config import parse
from stepdistill.errors import InputError

PERPLEXITY = {0: (10.0, 30.0, 20.0), 1: (12.0, 34.0, 26.0)}  # teacher, control, student
ACCURACY = {0: (0.9, 0.5, 0.7), 1: (0.9, 0.6, 0.9)}


def named(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("teacher", "control", "student"), values, strict=True))


def results(recipe: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "accuracy": named(ACCURACY[seed]), "parameters": {"teacher": 7000, "control": 300, "student": 300}, "layers": [0, 2],
    }  # fmt: skip
    if recipe == "tinybert":
        return {**found, "gap_closed": 0.5, "test_texts": 50, "trained_on": 1200, "classes": ["a", "b"], "steps": {}}
    more = {"masked_words": 1500, "tokens": 9000, "window": 64, "masks": 4, "gap_closed": None if seed else 0.5}
    return {**found, **more, "perplexity": {**named(PERPLEXITY[seed]), "before": 90.0}, "accuracy": {
        **named(ACCURACY[seed]), "before": 0.1,
    }}  # fmt: skip


@pytest.mark.parametrize("recipe", ["distilbert", "tinybert"])
def test_the_recipe_takes_the_command(recipe: str, tmp_path: Path) -> None:
    options = bert_students.Benchmark(recipe=recipe, settings="--teacher.width 32", runs=str(tmp_path))
    words = bert_students.command(options, 7)
    assert Path(words[1]).name == f"{recipe}.py"
    found = parse(load_recipe(recipe).Recipe, words[2:]).recipe
    assert (found.train.seed, found.teacher.width, found.output_dir) == (7, 32, str(tmp_path / "7")) and found.control
    assert found.train.lr_warmup_steps == {"distilbert": 100, "tinybert": 50}[recipe], "the demo's options"
    assert found.train.resume_from_checkpoint == "latest"


def test_differences_are_within_a_seed() -> None:
    found = bert_students.collected([results("distilbert", seed) for seed in (0, 1)])
    models = found["models"]
    assert (
        models["teacher"]["perplexity"]["values"] == [10.0, 12.0]
        and "minus_control" not in models["before"]["accuracy"]
    )
    student = models["student"]["perplexity"]
    assert student["mean"] == 23.0 and student["minus_control"]["values"] == [-10.0, -8.0]
    assert student["minus_teacher"]["values"] == [10.0, 14.0]
    # Student's t of one degree of freedom: 12.706 x std / sqrt(2), std = sqrt(2)
    assert student["minus_control"]["interval"] == pytest.approx([-9 - 12.7062, -9 + 12.7062], abs=1e-4)
    assert student["minus_control"]["exceeds_seed_noise"] is False
    assert models["student"]["accuracy"]["minus_control"]["values"] == pytest.approx([0.2, 0.3])
    assert found["gap_closed"] == {"mean": None, "std": None, "values": [0.5, None]}
    assert found["measured"] == {"masked_words": 1500, "tokens": 9000, "window": 64, "masks": 4, "layers": [0, 2]}


def test_runs_that_are_not_of_one_kind_are_refused() -> None:
    one, other = results("tinybert", 0), {**results("tinybert", 1), "test_texts": 51}
    with pytest.raises(InputError, match=r"same data, got test_texts 50 and 51.*--runs"):
        bert_students.collected([one, other])
    with pytest.raises(InputError, match="drop --control"):
        bert_students.collected([{**one, "accuracy": {"teacher": 0.9, "student": 0.8}}])
    for words, flag in (["--recipe", "lm_kd"], "--recipe"), (["--seeds", "0,0"], "--seeds"):
        with pytest.raises(InputError, match=flag):
            parse(bert_students.Benchmark, words)


@pytest.mark.parametrize("recipe", ["distilbert", "tinybert"])
def test_finished_runs_are_taken_and_told(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    def ran(words: list[str], **options: Any) -> None:
        assert options["check"], "a run that fails must not pass for one"
        parsed = parse(load_recipe(recipe).Recipe, words[2:])
        folder, seed = Path(parsed.recipe.output_dir), parsed.recipe.train.seed
        made.append(seed)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(parsed.yaml)
        (folder / "stepdistill.json").write_text(json.dumps({"results": results(recipe, seed)}))

    monkeypatch.setattr(bert_students, "subprocess", SimpleNamespace(run=ran))
    output = tmp_path / "found.json"
    words = ["--recipe", recipe, "--runs", str(tmp_path / "runs"), "--output", str(output)]
    bert_students.main(parse(bert_students.Benchmark, [*words, "--seeds", "0"]))
    first = json.loads(output.read_text())
    assert first["models"]["student"]["accuracy"]["minus_control"]["interval"] is None
    bert_students.main(parse(bert_students.Benchmark, [*words, "--seeds", "0,1"]))
    assert made == [0, 1], "a finished one is not run again"
    with pytest.raises(InputError, match=r"got teacher\.width: 128 -> 32"):
        bert_students.main(parse(bert_students.Benchmark, [*words, "--settings=--teacher.width 32"]))
    assert "student: accuracy 0.8, to the control +0.25" in capsys.readouterr().out

    about = json.loads(output.read_text())["protocol"]
    assert about["seeds"] == [0, 1] and about["steps"] == {
        "distilbert": {"teacher": 2500, "control": 300, "student": 300},
        "tinybert": {
            "teacher": 1500, "fine-tuning": 300, "general": 600, "intermediate": 400, "prediction": 300,
            "control-general": 600, "control": 700,
        },
    }[recipe]  # fmt: skip
    text = student_tables.bert_students(output)
    rows = {
        line[0]: line[1:] for line in ([c.strip() for c in row.strip("|").split("|")] for row in text.split("\n")[2:])
    }
    last = ["80.0% ± 14.1%", "+25.0%", "[-38.5%, +88.5%]", "no"]
    if recipe == "tinybert":
        assert rows["student"] == ["300", *last, "50.0% ± 0.0%"]
        assert "50 held-out texts of 2 classes, 1,200 to train on" in text and "Gap in accuracy" in text
    else:
        assert rows["student"] == ["300", "23.00 ± 4.24", "-9.00", "[-21.71, +3.71]", "no", *last, "none"]
        assert rows["student before training"][:2] == ["300", "90.00 ± 0.00"]
        assert "1,500 masked words of 9,000 held-out tokens in blocks of 64" in text and "Gap in perplexity" in text
    assert rows["teacher"][0] == "7,000" and "seeds 0, 1" in text and f"teacher {about['steps']['teacher']}" in text
