"""Networks of Transformers as they were before their training, by a run's config.yaml; a checkpoint's tensors go over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.labelled import LabelledConfig, class_names
from ..data.labelled_text import TaskConfig, open_task
from ..data.masked import framed_blocks
from ..data.text import Example, TextConfig, open_texts
from ..data.tokens import rows_of
from ..errors import InputError
from ..kd.attention import Shape
from ..kd.classifiers import ClassifierConfig, open_classifier
from ..kd.distilbert import ShallowConfig
from ..kd.distillm import DistiLLM
from ..kd.encoders import Encoders, EncoderStudentConfig, StagesConfig
from ..kd.gkd import GKD
from ..kd.masked import MaskedLM
from ..kd.minillm import MiniLLM
from ..kd.pair import CAUSAL, DEMO, MASKED, LMStudentConfig, LMTeacherConfig, Pair
from ..kd.text_classifier import TextClassifier
from ..networks.network import Network
from ..training.checkpoint import Checkpoint, CheckpointStore
from . import classifier, language_model, masked_lm, text_classifier
from .folder import read_facts
from .reading import section

CPU = torch.device("cpu")
TEACHER, TUNED, RANDOM = "teacher", "fine-tuning", "random"  # fits that recipes name so
LAYERS = ("general", "intermediate")  # of TinyBERT, which leave a student's head alone
ON_BLOCKS = (TEACHER, "general", "control-general")  # of TinyBERT, on blocks of general text
PROMPTED = (GKD.__name__, MiniLLM.__name__, DistiLLM.__name__)  # methods that learn from prompts
Changes = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Rebuilt:
    """A network as it was before its training, and what is written beside it.

    Attributes:
        task: as Transformers names it.
        network: takes the checkpoint's tensors.
        companion: tokenizer or image processor.
        probe: inputs of its module.
        base: path that it started from.
        details: lines of the card.
    """

    task: str
    network: Network
    companion: Any
    probe: Mapping[str, torch.Tensor]
    base: str
    details: list[str]


def language_model_of(run: Path, sections: dict[str, Any], changes: Changes, found: Checkpoint) -> Rebuilt:
    """Teacher or student of a run of language models."""
    teacher = section(LMTeacherConfig, sections, "teacher", changes["teacher"])
    student = section(LMStudentConfig, sections, "student", changes["student"])
    data, tokenizer = section(TextConfig, sections, "data"), _tokenizer_in(run)
    made = tokenizer is None and teacher.path == student.path == DEMO
    texts, window = open_texts(data).train if made else [], data.block_size
    pair = Pair(CAUSAL, teacher, student, texts, sections.get("vocabulary", 0), window, 0, CPU, tokenizer=tokenizer)
    if made:
        prompt = data.prompt if found.state["run"]["method"] in PROMPTED else 0
        _check_texts(run, data, len(rows_of(texts, pair.tokenizer, window, prompt)), found)
    taught = found.state["fit"] != TEACHER
    network = pair.student() if taught else pair.teacher(trains=True)
    base = (student if taught else teacher).path
    details = [f"tokenizer: {len(pair.tokenizer):,} tokens"]
    return Rebuilt("text-generation", network, pair.tokenizer, language_model.probe(pair.tokenizer), base, details)


def masked_lm_of(run: Path, sections: dict[str, Any], changes: Changes, found: Checkpoint) -> Rebuilt:
    """Teacher or student of a run whose students are made of their teacher's layers."""
    if changes["student"]:
        raise InputError(
            f"expected --teacher.path alone for {run}, whose student is made from its teacher, got --student.path; drop it"
        )
    teacher = section(LMTeacherConfig, sections, "teacher", changes["teacher"])
    student, data = section(ShallowConfig, sections, "student"), section(TextConfig, sections, "data")
    tokenizer, window, fit = _tokenizer_in(run), data.block_size, found.state["fit"]
    made = tokenizer is None and teacher.path == DEMO
    texts = open_texts(data).train if made else []
    pair = Pair(MASKED, teacher, None, texts, sections.get("vocabulary", 0), window, 0, CPU, tokenizer=tokenizer)
    if made:
        _check_texts(run, data, len(framed_blocks(texts, pair.tokenizer, window)), found)
    network, base = pair.teacher(trains=True), teacher.path
    details = [f"tokenizer: {len(pair.tokenizer):,} tokens"]
    if fit != TEACHER:
        layers = student.chosen(network.depth)
        network = student.student(network)
        if fit == RANDOM:
            base = DEMO
        else:
            details = masked_lm.details_of(layers, pair.tokenizer)
    probe = language_model.probe(pair.tokenizer)
    return Rebuilt(masked_lm.TASK, network, pair.tokenizer, probe, base, details)


def text_classifier_of(run: Path, sections: dict[str, Any], changes: Changes, found: Checkpoint) -> Rebuilt:
    """A network of TinyBERT's stages: of words or of the task's classes, the teacher's size or the student's."""
    teacher = section(LMTeacherConfig, sections, "teacher", changes["teacher"])
    student = section(EncoderStudentConfig, sections, "student", changes["student"])
    stages, fit = section(StagesConfig, sections, "stages"), found.state["fit"]
    data, wanted, tokenizer = (
        section(TextConfig, sections, "data"),
        section(TaskConfig, sections, "task"),
        _tokenizer_in(run),
    )
    classes: list[str] | tuple[str, ...] = read_facts(run).get("results", {}).get("classes", [])
    made = tokenizer is None and teacher.path == DEMO
    texts: list[Example] = []
    if made or not classes:
        task = open_task(wanted)
        classes = task.train.classes
        texts = task.apart_from(open_texts(data).train) if made else []
    tuned = stages.fine_tuned if fit == TUNED else None  # opened for itself alone
    window = max(data.block_size, wanted.length)
    encoders = Encoders(
        teacher, student, tuned, texts, sections.get("vocabulary", 0), window, classes, 0, CPU, known=tokenizer
    )
    if made and (seen := _on_blocks(run, found)) is not None:
        _check_texts(run, data, len(framed_blocks(texts, encoders.tokenizer, data.block_size)), seen)
    network, base = _encoder(encoders, fit)
    tells = isinstance(network, TextClassifier)
    kind = text_classifier.TASK if tells else masked_lm.TASK
    details = text_classifier.details_of(classes if tells else (), encoders.tokenizer)
    return Rebuilt(kind, network, encoders.tokenizer, language_model.probe(encoders.tokenizer), base, details)


def _encoder(encoders: Encoders, fit: str) -> tuple[MaskedLM | TextClassifier, str]:
    """(the network of this fit, the path that it started from)."""
    teacher, base = encoders.teacher(), encoders.pair.teacher_config.path
    if fit == TEACHER:
        return teacher, base
    if fit == TUNED:
        return encoders.tuned(teacher), encoders.fine_tuned or base
    lone, base = encoders.student(Shape.of(teacher).heads), encoders.student_config.path
    if fit == "control-general":
        return lone, base
    network = encoders.classifier(lone)
    return (network.layers_only() if fit in LAYERS else network), base  # what trains is what was averaged


def _on_blocks(run: Path, found: Checkpoint) -> Checkpoint | None:
    """A checkpoint whose number of samples tells by which tokenizer they were made; None where no fit had such."""
    if found.state["fit"] in ON_BLOCKS:
        return found
    stores = (CheckpointStore(run / "checkpoints" / fit) for fit in ON_BLOCKS)
    return next((seen for store in stores if (seen := store.find()) is not None), None)


def image_classifier_of(run: Path, sections: dict[str, Any], changes: Changes, found: Checkpoint) -> Rebuilt:
    """Teacher or student of a run of image classifiers."""
    role: Literal["teacher", "student"] = "teacher" if found.state["fit"] == TEACHER else "student"
    config = section(ClassifierConfig, sections, role, changes[role])
    data = section(LabelledConfig, sections, "data")
    classes, side = class_names(data), data.resolution
    network = open_classifier(config, role, 0, classes, CPU)
    pixels = torch.linspace(-1.0, 1.0, 2 * 3 * side * side).view(2, 3, side, side)
    probe, companion = classifier.probe(network, pixels), classifier.processor(network, side)
    details = [f"{len(classes)} classes, images of {side} pixels"]
    return Rebuilt("image-classification", network, companion, probe, config.path, details)


def _check_texts(run: Path, data: TextConfig, rows: int, found: Checkpoint) -> None:
    """A tokenizer that is made anew is a function of the texts: are they those of the training? InputError where not."""
    wanted = found.state["run"]["number of samples"]
    if rows != wanted:
        raise InputError(
            f"expected the texts that {run} was trained on, from which its tokenizer is made, got {rows} samples at "
            f"{data.path!r} where checkpoint {found.path} had {wanted}; put them back (docstrings: the same Python)"
        )


def _tokenizer_in(run: Path) -> Any:
    """The tokenizer that an earlier export left in the run's folder; None without one."""
    if "tokenizer_config.json" not in read_facts(run).get("files", []):
        return None
    from ..networks.pretrained import load_tokenizer

    return load_tokenizer(str(run.resolve()), "RUN")
