"""Distillation of classifiers: the loss written out, what T does to it, and resumption to the bit with batch norm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from toys import EXACT, Killed, options, rows, same, saved, stopping_after, weights

from stepdistill.batch import Batch
from stepdistill.config import CommaList
from stepdistill.data.labelled import LabelledImages
from stepdistill.errors import InputError
from stepdistill.kd.classifiers import ClassifierConfig, accuracy, open_classifier
from stepdistill.kd.hinton import HardLabels, Hinton, HintonConfig
from stepdistill.kd.networks import Classifier
from stepdistill.method import Method
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

CLASSES = 5
CPU = torch.device("cpu")


class Linear(nn.Module):
    """Logits of the pixels, without batch norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.out = nn.Linear(3 * 8 * 8, CLASSES)
        nn.init.normal_(self.out.weight, std=0.2, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.out.bias)

    def forward(self, pixel_values: Tensor) -> Any:
        return type("Output", (), {"logits": self.out(pixel_values.flatten(1))})


def pictures(count: int = 32, side: int = 8) -> LabelledImages:
    draws = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, 3, side, side), generator=draws, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % CLASSES, [str(i) for i in range(CLASSES)])


def batch(indices: Sequence[int] = range(6)) -> Batch:
    return pictures().batch(indices, StepRandom(0, 0, indices))


def pair() -> tuple[Classifier, Classifier]:
    return Classifier(Linear(1)), Classifier(Linear(0)).frozen()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_papers(temperature: float) -> None:
    student, teacher = pair()
    losses = Hinton(HintonConfig(temperature, 0.7, 0.3), student, teacher).training_step(batch())
    z, v = student(batch().data()), teacher(batch().data())
    soft = functional.kl_div((z / temperature).log_softmax(1), (v / temperature).softmax(1), reduction="batchmean")
    hard = functional.cross_entropy(z, batch().extra["labels"])
    assert_close(losses.total, 0.7 * temperature**2 * soft + 0.3 * hard)
    assert_close(losses.metrics["ce"], hard.detach())
    assert_close(losses.metrics["accuracy"], (z.argmax(1) == batch().extra["labels"]).float().mean())
    assert losses.count == 6.0


def test_the_gradient_of_the_soft_term_at_a_high_temperature_is_that_of_the_logits() -> None:
    """Section 2.1 of the paper: T^2 KL -> (z - v) / N for zero-mean logits."""
    student, teacher = pair()
    z, v = student(batch().data()), teacher(batch().data())
    z.retain_grad()
    method = Hinton(HintonConfig(1000.0, 1.0, 0.0), student, teacher)
    kept: list[Tensor] = []

    class Watching(Classifier):
        def __call__(self, images: Tensor) -> Tensor:
            logits = super().__call__(images)
            logits.retain_grad()
            kept.append(logits)
            return logits

    student.__class__ = Watching
    method.training_step(batch()).total.backward()
    apart = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
    assert kept[0].grad is not None
    assert_close(kept[0].grad, (apart / CLASSES / 6).detach(), rtol=2e-2, atol=1e-4)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_and_labels_may_be_missing() -> None:
    student = Classifier(Linear(0))
    unlabelled = batch()
    unlabelled.extra.clear()
    losses = Hinton(HintonConfig(4.0, 1.0, 0.0), student, pair()[1]).training_step(unlabelled)
    losses.total.backward()
    assert losses.total.abs().item() < 1e-6 and "accuracy" not in losses.metrics
    assert all(p.grad.abs().max() < 1e-6 for p in student.trainable())


def test_the_control_learns_from_labels_alone() -> None:
    student = Classifier(Linear(1))
    found = HardLabels(student).training_step(batch())
    assert_close(found.total, functional.cross_entropy(student(batch().data()), batch().extra["labels"]))


def test_other_classes_are_refused() -> None:
    student, teacher = pair()
    teacher.module.out = nn.Linear(3 * 8 * 8, CLASSES + 1)
    with pytest.raises(ValueError, match="same classes"):
        Hinton(HintonConfig(), student, teacher).training_step(batch())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.0}, "--method.temperature"), ({"kd_weight": 0.0}, "--method.kd_weight"),
        ({"ce_weight": -1.0}, "--method.ce_weight"), ({"temperature": float("nan")}, "--method.temperature"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        HintonConfig(**change)


# -- ResNets through the trainer -------------------------------------------------------------------------------------------


def resnet(role: Any, seed: int) -> Classifier:
    depths = ("1", "2") if role == "teacher" else ("1", "1")
    return open_classifier(
        ClassifierConfig(depths=CommaList(depths), widths=CommaList(("4", "8"))), role, seed, list("abcde"), CPU
    )


def made(seed: int = 1) -> Hinton:
    return Hinton(HintonConfig(), resnet("student", seed), resnet("teacher", 0).frozen())


def fit(folder: Path, method: Method, **changes: Any) -> Method:
    Trainer(options(**{"max_train_steps": 5, "adam_epsilon": 1e-3, **changes}), folder).fit(method, pictures(side=32))
    return method


def test_killed_and_resumed_is_the_same_to_the_bit_with_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpointing_steps": 2, "ema_decay": 0.9}
    wanted = fit(tmp_path / "whole", made(), **changes)
    dying = made()
    with pytest.raises(Killed), stopping_after(dying, 4, Killed.now):
        fit(tmp_path / "killed", dying, **changes)
    found = fit(tmp_path / "killed", made(seed=6), **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")
    assert any("running_mean" in name for name in weights(wanted))
    assert_close(weights(found), weights(wanted), **EXACT)


def test_the_teacher_is_in_eval_mode_and_its_statistics_stay(tmp_path: Path) -> None:
    method = made()
    before = {name: value.clone() for name, value in method.teacher.module.state_dict().items()}
    fit(tmp_path, method)
    assert_close(dict(method.teacher.module.state_dict()), before, **EXACT)
    assert method.student.module.training and rows(tmp_path)[-1]["step"] == 5


def test_without_batch_norm_one_batch_of_eight_is_two_of_four(tmp_path: Path) -> None:
    for name, more in (("one", {}), ("two", {"train_batch_size": 4, "gradient_accumulation_steps": 2})):
        Trainer(options(max_train_steps=4, adam_epsilon=1e-3, **more), tmp_path / name).fit(
            Hinton(HintonConfig(), *pair()), pictures()
        )
    assert_close(saved(tmp_path / "two")[0], saved(tmp_path / "one")[0], rtol=1e-4, atol=1e-6)
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-5, atol=1e-6)


# -- opening ---------------------------------------------------------------------------------------------------------------


def test_layouts_are_resnets_of_basic_blocks_from_their_seed() -> None:
    one, again, other = (resnet("student", seed) for seed in (3, 3, 4))
    assert_close(dict(one.module.state_dict()), dict(again.module.state_dict()), **EXACT)
    name = "resnet.embedder.embedder.convolution.weight"
    assert not torch.equal(one.module.state_dict()[name], other.module.state_dict()[name])
    assert one.module.config.layer_type == "basic" and one.classes[4] == "e" and one.module.training
    full = open_classifier(ClassifierConfig(), "student", 0, [str(i) for i in range(1000)], CPU)
    count = sum(p.numel() for p in full.module.parameters())
    assert count == 11_689_512, "ResNet-18, as it is known"


def test_checkpoints_of_other_classes_are_refused_and_their_pixels_are_scaled(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    resnet("student", 0).module.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--teacher.path"):  # no image processor
        open_classifier(ClassifierConfig(str(tmp_path)), "teacher", 0, list("abcde"), CPU)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    opened = open_classifier(ClassifierConfig(str(tmp_path)), "teacher", 0, list("abcde"), CPU)
    assert opened.mean == (0.1, 0.2, 0.3) and opened.std == (0.5, 0.6, 0.7)
    for classes in (list("abcd"), list("abcdf")):
        with pytest.raises(InputError, match="classes"):
            open_classifier(ClassifierConfig(str(tmp_path)), "student", 0, classes, CPU)


def test_layouts_that_are_none() -> None:
    for depths, widths in ((("1", "2"), ("4",)), (("0",), ("4",)), ((), ())):
        with pytest.raises(InputError, match="depths"):
            ClassifierConfig(depths=CommaList(depths), widths=CommaList(widths))


def test_accuracy_counts_what_is_right() -> None:
    data = pictures(23)
    classifier = Classifier(Linear(0))
    right = (classifier(data.pixels(range(23))).argmax(1) == data.labels).float().mean()
    assert accuracy(classifier, data, batch=10) == pytest.approx(float(right))
