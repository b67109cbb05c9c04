"""`stepdistill bench` of image classifiers: biases whose accuracy is known, and a comparison from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toys import recorded
from vision import MEAN, SEES, SIDE, STD, save

from stepdistill import cli
from stepdistill.bench.classifiers import ClassifierExam, accuracies, inputs, own_side, predictions
from stepdistill.bench.intervals import share
from stepdistill.bench.model_options import ModelOptions
from stepdistill.bench.rows import Value
from stepdistill.data.labelled import LabelledConfig, LabelledImages, open_labelled
from stepdistill.errors import InputError
from stepdistill.kd.classifiers import accuracy
from stepdistill.kd.networks import Classifier

COUNT, CLASSES = 60, 48


def held_out() -> LabelledImages:
    return open_labelled(LabelledConfig(images=1, test_images=COUNT, resolution=SIDE))[1]


def vit(bias: int | None = None, classes: int = CLASSES, **changes: Any) -> Any:
    """A small ViT; one that says class `bias` whatever it sees, where that is given."""
    import transformers as t

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.ViTForImageClassification(t.ViTConfig(**{**SEES, **changes}, num_labels=classes)).eval()
    if bias is not None:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.nn.functional.one_hot(torch.tensor(bias), classes))
    return model


@pytest.fixture(scope="module")
def often() -> list[int]:
    """Classes of the test images, the most frequent first."""
    return held_out().labels.bincount(minlength=CLASSES).argsort(descending=True).tolist()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, often: list[int]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(vit(often[0]), folder / "teacher")
    save(vit(often[-1], num_hidden_layers=1), folder / "other")
    shutil.copytree(folder / "teacher", folder / "copy")
    return folder


def command(place: Path, out: Path, *words: str, students: tuple[str, ...] = ("copy", "other")) -> list[str]:
    named = [word for name in students for word in ("--student", str(place / name))]
    usual = ["--data.test_images", str(COUNT), "--repeats", "6", "--batch_sizes", "3,1"]
    return ["bench", "--teacher", str(place / "teacher"), *named, "--output_dir", str(out), *usual, *words]


def test_a_comparison_from_the_command_line(place: Path, tmp_path: Path, often: list[int]) -> None:
    cli.main(command(place, tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["kind"] == "image classifier" and [row["name"] for row in found["rows"]] == [
        "teacher",
        "copy",
        "other",
    ]
    teacher, copy, other = (row["values"] for row in found["rows"])
    counts = held_out().labels.bincount(minlength=CLASSES)
    most, least = int(counts[often[0]]), int(counts[often[-1]])
    assert most > least
    for values, right in ((teacher, most), (copy, most), (other, least)):
        wanted = share(right, COUNT)
        assert values["accuracy"] == {"value": right / COUNT, "interval": list(wanted.interval or ())}
    assert copy["accuracy_difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert copy["agreement"]["value"] == 1.0 and other["agreement"]["value"] == 0.0 and "agreement" not in teacher
    assert other["accuracy_difference"]["value"] == pytest.approx((least - most) / COUNT)
    low, high = other["accuracy_difference"]["interval"]
    assert low < (least - most) / COUNT < high
    protocol = found["protocol"]
    assert (protocol["images"], protocol["resolution"], protocol["classes"]) == (COUNT, SIDE, CLASSES)
    for row in found["rows"]:
        values, seconds = row["values"], row["seconds"]
        assert {name: len(taken) for name, taken in seconds.items()} == {"batch 3": 6, "batch 1": 6}
        assert values["images_per_second_3"]["value"] == pytest.approx(3 / np.median(seconds["batch 3"]))
        assert values["ms_1"]["value"] == pytest.approx(1000 * np.median(seconds["batch 1"]))
    ratios = np.array(found["rows"][0]["seconds"]["batch 1"]) / found["rows"][2]["seconds"]["batch 1"]
    assert other["times_faster"]["value"] == pytest.approx(np.median(ratios))
    assert found["rows"][0]["parameters"] == sum(p.numel() for p in vit().parameters())
    table = (tmp_path / "results.md").read_text()
    smaller = found["rows"][2]["parameters"] / found["rows"][0]["parameters"]
    assert smaller < 1 and f"beside the teacher's, {smaller:.3g} x its parameters, " in table
    assert "- copy: accuracy +0.0% [+0.0%, +0.0%] beside the teacher's, 1 x its parameters, " in table
    assert "images / s, batch 3" in table and "images / s, batch 1" not in table
    assert f"on {COUNT} images; Wilson's interval" in (tmp_path / "report.html").read_text().replace("&#39;", "'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "4"], "got --steps; drop it"),
        (["--data.resolution", "48"], "expected teacher to take images of 48 pixels"),
        (["--data.resolution", "4"], "fix --data.resolution"),
        (["--batch_sizes", "0"], "fix --batch_sizes"),
    ],
)
def test_mistakes(place: Path, tmp_path: Path, words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command(place, tmp_path / "out", *words, students=()))
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_models_of_other_classes_and_kinds(place: Path, tmp_path: Path, capsys: Any) -> None:
    save(vit(classes=5), tmp_path / "five")
    words = command(place, tmp_path / "out", students=())
    with pytest.raises(SystemExit):
        cli.main([*words, "--student", str(tmp_path / "five")])
    assert "expected the 48 classes of the images" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(SystemExit):
        cli.main([*words, "--student", str(tmp_path / "lm")])
    assert "expected models of one kind" in " ".join(capsys.readouterr().err.split())


def test_predictions_are_those_that_recipes_count() -> None:
    data, network = held_out(), Classifier(vit(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)).frozen()
    found = predictions(network, data)
    assert (found == data.labels.numpy()).mean() == accuracy(network, data, 7) and len(set(found)) > 1
    half = Classifier(vit().to(torch.bfloat16)).frozen()
    assert inputs(half, data, [1, 0]).dtype == torch.bfloat16
    assert_close(inputs(network, data, [1, 0]), data.pixels([1, 0]))
    broken = vit()
    with torch.no_grad():
        broken.classifier.bias[3] = torch.nan
    with pytest.raises(InputError, match="expected finite logits"):
        predictions(Classifier(broken).frozen(), data)


def test_models_see_pixels_as_their_processors_scale_them_and_batches_go_round(place: Path) -> None:
    data = {"test_images": 4}
    options = ModelOptions(
        "image classifier", str(place / "teacher"), (), data, {}, "fp32", (6,), 1, 0, True, "", False
    )
    exam = ClassifierExam(options, {"teacher": str(place / "teacher")}, torch.device("cpu"))
    network = exam.networks["teacher"]
    assert (network.mean, network.std) == (MEAN, STD) and exam.data.resolution == SIDE
    first: Any = network.module
    with recorded(first.vit.embeddings.patch_embeddings.projection) as calls:
        exam._call(network, 6)
    assert [given[0].shape[0] for given, _ in calls] == [6], "of four images"


def test_accuracies_are_paired() -> None:
    """Two that are wrong of the same images differ by nothing, however few are right; intervals are of the same draws."""
    labels = np.arange(8) % 2
    said = {"teacher": labels.copy(), "a": 1 - labels, "b": labels.copy()}
    said["teacher"][:4] = said["b"][:4] = 7
    found = accuracies(said, labels, seed=0)
    assert found["teacher"] == {"accuracy": share(4, 8)}
    assert found["b"]["accuracy_difference"] == Value(0.0, (0.0, 0.0)) and found["b"]["agreement"] == share(8, 8)
    assert found["a"]["accuracy_difference"].value == -0.5 and found["a"]["agreement"] == share(0, 8)
    low, high = found["a"]["accuracy_difference"].interval or (0, 0)
    assert -1 <= low < -0.5 < high <= 0
    draws = np.random.default_rng(0)
    truth = draws.integers(0, 2, 200)
    many = {name: draws.integers(0, 2, 200) for name in ("teacher", "a")}
    intervals = [accuracies(many, truth, seed)["a"]["accuracy_difference"].interval for seed in (0, 0, 1, 2, 3)]
    assert intervals[0] == intervals[1] and len(set(intervals)) > 1, "draws are of the seed"
    assert accuracies({"teacher": labels}, labels, seed=0) == {"teacher": {"accuracy": share(8, 8)}}


def test_the_side_that_a_processor_makes(tmp_path: Path) -> None:
    assert own_side(str(save(vit(), tmp_path / "a"))) == SIDE
    assert own_side(str(save(vit(), tmp_path / "b", size={"height": 32, "width": 48}))) is None
    crop = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    settings = {**crop, "size": {"shortest_edge": 32}, "image_processor_type": "CLIPImageProcessor"}
    assert own_side(str(save(vit(), tmp_path / "c", **settings))) == 24
