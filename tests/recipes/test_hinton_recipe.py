"""The recipe for classifiers as users run it: a table, a student that stock Transformers opens, the same when resumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file

from stepdistill.data.labelled import LabelledConfig, open_labelled
from stepdistill.errors import InputError

TINY = [
    "--teacher.depths", "1,2", "--teacher.widths", "8,16", "--student.depths", "1,1", "--student.widths", "4,8", "--seeds", 2,
    "--teacher_steps", 3, "--train.max_train_steps", 2, "--train.train_batch_size", 4, "--train.learning_rate", "1e-2",
    "--data.resolution", 32, "--data.images", 24, "--data.labelled", 16, "--data.test_images", 20, "--temperatures", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = [*TINY, "--output_dir", folder]
    run_in_process(load_recipe("hinton"), arguments)
    return folder, arguments


def test_what_a_run_leaves_behind(finished: Any) -> None:
    folder, _ = finished
    found = json.loads((folder / "stepdistill.json").read_text())
    results = found["results"]
    assert results["accuracy"].keys() == {"labels alone", "T = 1", "T = 4"}
    assert all(len(v) == 2 and all(0 <= a <= 1 for a in v) for v in results["accuracy"].values())
    assert results["exported_accuracy"] == results["accuracy"]["T = 4"][0], (
        "the first student at the method's own temperature"
    )
    assert results["trained_on"] == {"teacher": 24, "student": 16} and found["verified"]["logits_differ_by"] == 0.0
    assert results["parameters"]["student"] < results["parameters"]["teacher"]
    card = (folder / "README.md").read_text()
    assert "| student, T = 4 |" in card and "labels alone" in card and 'pipeline_tag: "image-classification"' in card
    fits = {path.name for path in (folder / "checkpoints").iterdir()}
    assert fits == {"teacher", *(f"{group}-{n}" for group in ("labelsalone", "T=1", "T=4") for n in (0, 1))}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3 + 6 * 2


@torch.no_grad()
def test_stock_transformers_sees_what_the_student_sees(finished: Any) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder, _ = finished
    model, processor = (cls.from_pretrained(folder) for cls in (AutoModelForImageClassification, AutoImageProcessor))
    _, test = open_labelled(LabelledConfig(resolution=32, images=1, test_images=20))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in test.images]
    logits = model(**processor(pictures, return_tensors="pt")).logits
    right = float(np.mean(logits.argmax(1).numpy() == test.labels.numpy()))
    results = json.loads((folder / "stepdistill.json").read_text())["results"]
    assert right == pytest.approx(results["exported_accuracy"])
    assert model.config.id2label[47] == test.classes[47]


def test_a_finished_run_resumed_is_the_same_run(finished: Any) -> None:
    folder, arguments = finished
    kept, metrics = load_file(folder / "model.safetensors"), (folder / "metrics.jsonl").read_text()
    run_in_process(load_recipe("hinton"), [*arguments, "--train.resume_from_checkpoint", "latest"])
    after = load_file(folder / "model.safetensors")
    assert kept.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in kept.items())
    assert (folder / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seeds", 0], "--seeds"), (["--temperatures", "0"], "--method.temperature"),
        (["--teacher_steps", -1], "--teacher_steps"),
        (["--data.labelled", 100], "--data.labelled"), (["--student.widths", "4"], "--student.widths"),
        (["--teacher.path", "/no/model"], "--teacher.path"),
    ],
)  # fmt: skip
def test_bad_input_names_the_fix_and_trains_nothing(tmp_path: Path, more: list[Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        run_in_process(load_recipe("hinton"), [*TINY, "--output_dir", tmp_path / "out", *more])
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
