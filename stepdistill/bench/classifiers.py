"""Image classifiers side by side: accuracy on the same test images, and seconds of a batch, in turns."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import LabelledConfig, LabelledImages, open_labelled
from ..errors import InputError
from ..kd.classifiers import ClassifierConfig, check_classes, normalisation
from ..kd.networks import Classifier
from ..networks.pretrained import explained, load_model
from .contenders import DTYPES
from .intervals import RESAMPLES, ends, median, resampled_means, scaled, share, times_faster
from .latency import latency_pass
from .model_options import ModelOptions
from .model_rows import Found, teacher_first
from .quantities import Quantity
from .rows import TEACHER, Value

BATCH = 64  # images at once while they are classified


class ClassifierExam:
    """Teacher and students of the same classes, and the images that they are measured on.

    Args:
        options: as given on the command line.
        paths: name -> folder or hub id, the teacher first.
        device: where they go.

    Raises InputError for models that can't be opened, or that tell other classes apart.
    """

    def __init__(self, options: ModelOptions, paths: dict[str, str], device: torch.device) -> None:
        self.options, self.device = options, device
        side = options.data.get("resolution") or own_side(paths[TEACHER])
        # images to train on are not looked at
        self.data = LabelledConfig(**{**options.data, **({} if side is None else {"resolution": side}), "images": 1})
        self.test: LabelledImages = open_labelled(self.data)[1]
        self.networks = {name: self._open(name, path) for name, path in paths.items()}

    def _open(self, name: str, path: str) -> Classifier:
        flag = "--teacher" if name == TEACHER else "--student"
        model = load_model("AutoModelForImageClassification", path, flag, dtype=DTYPES[self.options.dtype])
        check_classes(model, self.test.classes, f"{flag} {path}")
        mean, std = normalisation(ClassifierConfig(path), flag)
        return Classifier(model.to(self.device), mean, std).frozen()

    def measure(self) -> Found:
        """Accuracies with their intervals, then the seconds, all models in turns."""
        teacher, students = teacher_first(list(self.networks))
        said = {name: self._classes_of(name) for name in self.networks}
        values = accuracies(said, self.test.labels.numpy(), self.options.seed)
        seconds = {} if self.options.skip_latency else self._seconds()
        for name, timed in seconds.items():
            for size in self.options.batch_sizes:
                middle = median(timed[_batch(size)])
                values[name][f"ms_{size}"] = scaled(middle, 1000.0)
                values[name][f"images_per_second_{size}"] = scaled(middle, size, inverse=True)
        first = _batch(min(self.options.batch_sizes))
        for name in students if seconds else ():
            values[name]["times_faster"] = times_faster(seconds[teacher][first], seconds[name][first])
        return Found(
            self._columns(),
            values,
            seconds,
            self._protocol(),
            ("accuracy_difference", "accuracy {} beside the teacher's"),
        )

    def _classes_of(self, name: str) -> np.ndarray:
        with explained(f"{name} to take images of {self.data.resolution} pixels", "--data.resolution"):
            return predictions(self.networks[name], self.test)

    def _seconds(self) -> dict[str, dict[str, tuple[float, ...]]]:
        calls = {name: partial(self._call, network) for name, network in self.networks.items()}
        found: dict[str, dict[str, tuple[float, ...]]] = {name: {} for name in self.networks}
        for (name, size), timing in latency_pass(calls, self.options.batch_sizes, self.options.repeats).items():
            found[name][_batch(size)] = timing.seconds
        return found

    def _call(self, network: Classifier, size: int) -> None:
        """One batch of the first images, from the top again where there are fewer."""
        images = inputs(network, self.test, [i % len(self.test) for i in range(size)])
        with network.evaluating():
            network(images)

    def _columns(self) -> tuple[Quantity, ...]:
        speed: list[Quantity] = []
        for size in self.options.batch_sizes:
            note = f"{size} image{'s' * (size > 1)} a call, medians of calls in turns"
            speed.append(Quantity(f"ms_{size}", f"ms, batch {size}", "lower", ".3g", note=note if size == 1 else ""))
            if size > 1:
                speed.append(
                    Quantity(f"images_per_second_{size}", f"images / s, batch {size}", "higher", ".3g", note=note)
                )
        first = min(self.options.batch_sizes)
        return (
            Quantity("accuracy", "accuracy", "higher", ".1%", note=f"on {len(self.test):,} images; Wilson's interval"),
            Quantity("accuracy_difference", "less teacher's", "higher", "+.1%",
                     note="in percentage points; bootstrap over images, the same drawn for both"),
            Quantity("agreement", "agreement", "higher", ".1%", note="share of images that are the same class to the teacher"),
            *speed,
            Quantity("times_faster", "x faster", "higher", ".2f",
                     note=f"batch {first}, median over turns of teacher's over own"),
        )  # fmt: skip

    def _protocol(self) -> dict[str, Any]:
        return {
            "data": {"path": self.data.path, "split": self.data.split, "test_split": self.data.test_split},
            "images": len(self.test),
            "resolution": self.data.resolution,
            "classes": len(self.test.classes),
            "bootstrap": {"units": "images", "count": len(self.test), "resamples": RESAMPLES},
            "batch_sizes": list(self.options.batch_sizes),
        }


def _batch(size: int) -> str:
    return f"batch {size}"


def own_side(path: str) -> int | None:
    """Side of the square images that a checkpoint's image processor makes; None where it says no such thing."""
    from transformers import AutoImageProcessor

    with explained(f"an image processor at {path!r}", "--teacher"):
        found = AutoImageProcessor.from_pretrained(path).to_dict()
    size = found["crop_size"] if found.get("do_center_crop") and found.get("crop_size") else found.get("size")
    sides = set((size or {}).values())
    return int(sides.pop()) if len(sides) == 1 else None


def inputs(network: Classifier, data: LabelledImages, indices: list[int]) -> Tensor:
    """Images in [-1, 1], where and in the dtype that the network's weights are."""
    weight = next(network.module.parameters())
    return data.pixels(indices).to(weight.device, weight.dtype)


def predictions(network: Classifier, data: LabelledImages) -> np.ndarray:
    """The likeliest class of each image, int64 [N]."""
    found = []
    with network.evaluating():
        for start in range(0, len(data), BATCH):
            rows = list(range(start, min(start + BATCH, len(data))))
            logits = network(inputs(network, data, rows))
            if not bool(torch.isfinite(logits).all()):
                raise InputError("expected finite logits, got others; try --dtype bf16 or fp32")
            found.append(logits.argmax(1).cpu())
    return torch.cat(found).numpy()


def accuracies(said: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, dict[str, Value]]:
    """Accuracy of each model; of the students how it differs from the teacher's, and how often they agree.

    Args:
        said: name -> class of each image [N], the teacher's first.
        labels: [N].
    """
    teacher, students = teacher_first(list(said))
    n = len(labels)
    right = {name: found == labels for name, found in said.items()}
    values = {name: {"accuracy": share(int(hits.sum()), n)} for name, hits in right.items()}
    if not students:
        return values
    gaps = np.stack([right[name].astype(np.float64) - right[teacher] for name in students], axis=1)
    drawn = resampled_means(gaps, np.ones(n), seed)
    for i, name in enumerate(students):
        values[name]["accuracy_difference"] = Value(float(gaps[:, i].mean()), ends(drawn[:, i]))
        values[name]["agreement"] = share(int((said[name] == said[teacher]).sum()), n)
    return values
