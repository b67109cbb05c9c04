"""The end of a classifier's distillation: accuracy over seeds beside the control group, latency, the student's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ..bench.latency import measure, summary
from ..data.labelled import LabelledImages
from ..kd.classifiers import ClassifierConfig, accuracy
from ..kd.networks import Classifier, sizes
from .config import NetworkExportConfig
from .hub import push
from .transformer import Report, export_network

TITLE, CONTROL = "Distilled image classifier", "labels alone"
REPEATS = 20  # timed calls of each network


def group_name(temperature: float | None) -> str:
    """Of the students at a temperature; None is the control group."""
    return CONTROL if temperature is None else f"T = {temperature:g}"


def fit_name(temperature: float | None, number: int) -> str:
    """Of a student's training, as its checkpoints are named."""
    return f"{group_name(temperature).replace(' ', '')}-{number}"


def gap_closed(control: float, student: float, teacher: float) -> float | None:
    """(student - control) / (teacher - control) of accuracies; None where the teacher is no better than the control."""
    return (student - control) / (teacher - control) if teacher > control else None


def finish(
    folder: str | Path,
    configs: tuple[ClassifierConfig, ClassifierConfig],
    teacher: Classifier,
    student: Classifier,
    scores: Mapping[str, Sequence[float]],
    test: LabelledImages,
    trained_on: Mapping[str, int],
    export: NetworkExportConfig | None = None,
) -> dict[str, Any]:
    """Measures the teacher, times both, exports the student and prints the table; returns the results.

    Args:
        configs: of teacher and student.
        student: the one that is exported.
        scores: group -> accuracy on `test` of each of its students.
        trained_on: how many images teacher and students saw.
        export: in which precision the student is written, and where it is uploaded.
    """
    networks = {"teacher": teacher, "student": student}
    best, parameters, seconds = accuracy(teacher, test), sizes(networks), _latency(networks, test)
    results: dict[str, Any] = {
        "teacher_accuracy": best,
        "accuracy": {name: list(values) for name, values in scores.items()},
        "exported_accuracy": accuracy(student, test),
        "latency_ms": seconds,
        "parameters": parameters,
        "test_images": len(test),
        "trained_on": dict(trained_on),
    }
    if CONTROL in scores:
        control = mean(scores[CONTROL])
        results["gap_closed"] = {n: gap_closed(control, mean(v), best) for n, v in scores.items() if n != CONTROL}
    table = _table(results)
    details = [f"{len(test.classes)} classes, images of {test.images.shape[-1]} pixels"]
    report = Report(
        "image-classification", "hinton", TITLE, configs[1].path, configs[0].path, results,
        details, {"Results": table},
    )  # fmt: skip
    export, pixels = export or NetworkExportConfig(), test.pixels(range(min(2, len(test))))
    export_network(folder, student, processor(student, pixels.shape[-1]), probe(student, pixels), report, export.dtype)
    address = push(folder, export)
    print(f"{table}\nthe student is in {folder}{f', and at {address}' if address else ''}")
    return results


def probe(student: Classifier, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a classifier is compared on: images [B, 3, H, W] in [-1, 1] as its module takes them."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (student.mean, student.std))
    return {"pixel_values": ((pixels + 1) / 2 - mean) / std}


def _latency(networks: Mapping[str, Classifier], test: LabelledImages) -> dict[str, float]:
    """Median milliseconds of one image, the networks in turns."""
    calls = {}
    for name, network in networks.items():
        image = test.pixels([0]).to(next(network.module.parameters()).device)
        calls[name] = partial(_call, network, image)
    return {name: 1000.0 * summary(values)["p50"] for name, values in measure(calls, REPEATS, 3).items()}


def _call(network: Classifier, image: torch.Tensor) -> None:
    with network.evaluating():
        network(image)


def processor(student: Classifier, side: int) -> Any:
    """What scales an image to what the student was trained on."""
    from transformers import ViTImageProcessor

    three = [list(v) * (3 if len(v) == 1 else 1) for v in (student.mean, student.std)]
    return ViTImageProcessor(size={"height": side, "width": side}, image_mean=three[0], image_std=three[1])


def _table(results: Mapping[str, Any]) -> str:
    size, seconds = results["parameters"], results["latency_ms"]
    rows = ["| model | accuracy | gap closed | parameters | ms an image |", "|---|---|---|---|---|"]
    rows.append(f"| teacher | {results['teacher_accuracy']:.1%} | | {size['teacher']:,} | {seconds['teacher']:.2f} |")
    for name, values in results["accuracy"].items():
        gap = results.get("gap_closed", {}).get(name)
        shown = "" if gap is None or math.isnan(gap) else f"{gap:.0%}"
        rows.append(
            f"| student, {name} | {_spread(values)} | {shown} | {size['student']:,} | {seconds['student']:.2f} |"
        )
    seeds = max(len(values) for values in results["accuracy"].values())
    seen = results["trained_on"]
    note = (
        f"{results['test_images']:,} test images; the teacher was trained on {seen['teacher']:,} images, the students on "
        f"{seen['student']:,} of them, for equally many steps each, {seeds} seed{'s' * (seeds > 1)} (mean and standard "
        "deviation)."
    )
    return "\n".join([*rows, "", note])


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1%}" + (f" +- {100 * stdev(values):.1f}" if len(values) > 1 else "")
