"""A teacher and students that classify images: opened from checkpoints, or ResNets laid out anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import CommaList
from ..data.labelled import LabelledImages
from ..errors import InputError
from ..networks.lora import StudentConfig
from .networks import Classifier

DEMO = "demo"


@dataclass
class ClassifierConfig:
    """An image classifier.

    Attributes:
        path: a folder or hub id of an image classifier, or "demo" for a ResNet of basic blocks that is made anew.
        revision: branch, tag or commit on the hub.
        depths: blocks of each stage of the demo: 3,4,6,3 is ResNet-34, 2,2,2,2 is ResNet-18.
        widths: channels of each stage of the demo: 64,128,256,512 in both.
    """

    path: str = DEMO
    revision: str | None = None
    depths: CommaList = CommaList(("2", "2", "2", "2"))  # noqa: RUF009  # immutable
    widths: CommaList = CommaList(("64", "128", "256", "512"))  # noqa: RUF009

    def __post_init__(self) -> None:
        depths, widths = self.layout()
        if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
            raise InputError(
                f"expected as many depths as widths, all at least 1, got {','.join(self.depths)} and {','.join(self.widths)}; "
                "fix --teacher.depths, --teacher.widths, --student.depths or --student.widths"
            )

    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(depths, widths)."""
        return self.depths.ints(), self.widths.ints()

    def steps(self, train: int, asked: int | None) -> int:
        """Optimizer steps before it teaches: those asked for, or twice a student's `train`, none of a checkpoint."""
        if asked is not None and asked < 0:
            raise InputError(f"expected teacher_steps >= 0, got {asked}; fix --teacher_steps")
        return asked if asked is not None else 2 * train if self.path == DEMO else 0


def open_classifier(
    config: ClassifierConfig,
    role: Literal["teacher", "student"],
    seed: int,
    classes: Sequence[str],
    device: torch.device,
) -> Classifier:
    """A classifier that trains, of these classes; InputError for a checkpoint of others.

    Args:
        seed: of the weights of a layout.
    """
    from .layouts import resnet_layout

    flag = f"--{role}.path"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    if config.path == DEMO:
        model = resnet_layout(*config.layout(), classes, seed)
    else:
        from ..networks.pretrained import load_model

        model = load_model("AutoModelForImageClassification", config.path, flag, config.revision)
        mean, std = normalisation(config, flag)
        check_classes(model, classes, flag)
    return Classifier(model.to(device), mean, std).student(StudentConfig(kind="full"))


def check_classes(model: Any, classes: Sequence[str], flag: str) -> None:
    """InputError for a model of other classes than these; one whose classes have numbers alone is taken at its word."""
    found = [str(model.config.id2label[i]) for i in sorted(model.config.id2label)]
    numbered = found == [f"LABEL_{i}" for i in range(len(found))]
    if len(found) != len(classes) or not (numbered or found == list(classes)):
        raise InputError(
            f"expected the {len(classes)} classes of the images ({', '.join(classes[:3])}, ...) in {flag}, got {len(found)} "
            f"({', '.join(found[:3])}, ...); a checkpoint of other classes has to be fine-tuned on these first"
        )


def normalisation(config: ClassifierConfig, flag: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1], as the checkpoint's image processor has them."""
    from transformers import AutoImageProcessor

    from ..networks.pretrained import explained

    with explained(f"an image processor at {config.path!r}", flag):
        found = AutoImageProcessor.from_pretrained(config.path, revision=config.revision or "main").to_dict()
    return tuple(found.get("image_mean") or (0.0,)), tuple(found.get("image_std") or (1.0,))


def accuracy(classifier: Classifier, data: LabelledImages, batch: int = 250) -> float:
    """The share of images whose likeliest class is theirs."""
    device = next(classifier.module.parameters()).device
    right = 0
    with classifier.evaluating():
        for start in range(0, len(data), batch):
            rows = range(start, min(start + batch, len(data)))
            right += int(
                (classifier(data.pixels(rows).to(device)).argmax(1).cpu() == data.labels[rows.start : rows.stop]).sum()
            )
    return right / len(data)
