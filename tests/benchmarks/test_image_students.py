"""Image students over seeds: the run that is asked for, what its numbers say, and the table."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import image_students
import pytest
import student_tables
import yaml
from recipe_runs import load_recipe

from stepdistill.config import parse
from stepdistill.errors import InputError

CONTROL = "labels alone"


def results(**groups: list[float]) -> dict[str, Any]:
    return {
        "teacher_accuracy": 0.9, "accuracy": groups, "parameters": {"teacher": 7000, "student": 300},
        "latency_ms": {"teacher": 4.0, "student": 1.0}, "test_images": 50, "trained_on": {"teacher": 200, "student": 20},
    }  # fmt: skip


def test_the_recipe_takes_the_command() -> None:
    options = image_students.Benchmark(seeds=2, temperatures="3", settings="--train.seed 5", runs="somewhere")
    words = image_students.command(options)[2:]
    recipe = parse(load_recipe("hinton").Recipe, words).recipe
    assert (recipe.seeds, recipe.temperatures.floats(), recipe.train.seed) == (2, (3.0,), 5)
    assert recipe.output_dir == "somewhere" and recipe.data.labelled == 480 and recipe.control


def test_differences_are_to_the_control_of_the_same_seed() -> None:
    found = image_students.collected(results(**{CONTROL: [0.3, 0.5], "T = 4": [0.4, 0.7]}))
    assert found["teacher"] == 0.9 and found["control"]["mean"] == pytest.approx(0.4)
    row = found["groups"]["T = 4"]
    assert row["minus_control"]["values"] == pytest.approx([0.1, 0.2])
    assert row["gap_closed"]["values"] == pytest.approx([0.1 / 0.6, 0.2 / 0.4])
    # Student's t of one degree of freedom: 12.706 x std / sqrt(2), std = .1 / sqrt(2)
    assert row["minus_control"]["interval"] == pytest.approx([0.15 - 0.6353, 0.15 + 0.6353], abs=1e-4)
    assert row["minus_control"]["exceeds_seed_noise"] is False
    with pytest.raises(InputError, match="--control"):
        image_students.collected(results(**{"T = 4": [0.4, 0.7]}))


def test_a_finished_run_is_taken_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[list[str]] = []

    def ran(words: list[str], **options: Any) -> None:
        assert options["check"], "a run that fails must not pass for one"
        made.append(words)
        found = results(**{CONTROL: [0.25, 0.35], "T = 1": [0.45, 0.55]})
        (tmp_path / "stepdistill.json").write_text(json.dumps({"results": found}))
        sections = {
            "teacher_steps": 60, "method": {"kd_weight": 0.9, "ce_weight": 0.1},
            "train": {
                "max_train_steps": 5, "train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
            },
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))

    class Ran:
        run = staticmethod(ran)

    monkeypatch.setattr(image_students, "subprocess", Ran)
    words = ["--runs", str(tmp_path), "--seeds", "2", "--output", str(tmp_path / "found.json")]
    for _ in range(2):
        image_students.main(parse(image_students.Benchmark, words))
    assert len(made) == 1 and subprocess.run is not ran
    assert "T = 1: 50.0%, to the control +20.0%" in capsys.readouterr().out
    text = student_tables.image_students(tmp_path / "found.json")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:5]]
    assert rows[2][:4] == ["teacher", "7,000", "4.00", "90.0%"]
    assert rows[3][:4] == ["control", "300", "1.00", "30.0% ± 7.1%"]
    assert rows[4][0] == "T = 1" and rows[4][3:7] == ["50.0% ± 7.1%", "+20.0%", "[+20.0%, +20.0%]", "yes"]
    assert "60 steps" in text and "5 steps of 8" in text and "0.9 of the teacher" in text
