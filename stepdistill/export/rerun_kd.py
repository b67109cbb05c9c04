"""`stepdistill export RUN` for runs of classic distillation: a network of Transformers, from config.yaml and a checkpoint.

A run holds more than its student: the control group, students of further seeds, a teacher that was trained in it. Each is a
fit with checkpoints of its own, and is exported as what it is. Results of the run go with the weights that they were measured
on, which the run's stepdistill.json knows by a hash; other weights have none, and their card says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.labelled import LabelledConfig, class_names
from ..data.text import TextConfig, open_texts
from ..data.tokens import rows_of
from ..errors import InputError
from ..kd.classifiers import ClassifierConfig, open_classifier
from ..kd.gkd import GKD, GKDConfig
from ..kd.hinton import HintonConfig
from ..kd.language_model import LanguageModelKDConfig
from ..kd.pair import CAUSAL, DEMO, LMStudentConfig, LMTeacherConfig, Pair
from ..networks.network import Network
from ..training.checkpoint import Checkpoint, CheckpointStore
from . import classifier, language_model
from .config import NetworkExportConfig
from .folder import read_facts
from .hub import check_hub, push
from .reading import find_checkpoint, load_student, section
from .transformer import Report, export_network, student_hash

CPU = torch.device("cpu")
TEACHER = "teacher"
UNTAUGHT = {  # fits without a teacher: the title of a card
    TEACHER: "Teacher, trained for a distillation",
    "sft": "Student before its distillation, fine-tuned on text",
    "control": "Control group of a distillation, trained without a teacher",
    "labelsalone": "Control group of a distillation, trained without a teacher",
}
Changes = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Rebuilt:
    """A network as it was before its training, and what is written beside it.

    Attributes:
        network: takes the checkpoint's tensors.
        companion: tokenizer or image processor.
        probe: inputs of its module.
        base: path that it started from.
        details: lines of the card.
    """

    network: Network
    companion: Any
    probe: Mapping[str, torch.Tensor]
    base: str
    details: list[str]


@dataclass(frozen=True)
class Recipe:
    """A recipe of classic distillation.

    Attributes:
        task: of the networks.
        title: of the student's card.
        options: what the section `method` came from.
        student: (sections) -> the fit whose student the recipe exports.
        rebuild: (run, sections, changes, checkpoint) -> the network that this checkpoint is of.
    """

    task: str
    title: str
    options: type[Any]
    student: Callable[[dict[str, Any]], str]
    rebuild: Callable[[Path, dict[str, Any], Changes, Checkpoint], Rebuilt]


def export_distilled(
    run: Path, folder: Path, sections: dict[str, Any], which: str = "latest", changes: Changes | None = None
) -> Path:
    """Exports a network of `run` into `folder`, its averaged weights where training kept an average; returns the folder.

    Args:
        sections: of the run's config.yaml.
        which: "latest" of the recipe's student, a step, a fit's name, or a checkpoint's folder.
        changes: fields to change in the sections teacher, student and export.

    Raises:
        InputError: flags of other recipes, no such checkpoint, or `folder` is the run's and holds another network's results.
    """
    changes = {"teacher": {}, "student": {}, "export": {}, **(changes or {})}
    name = recipe_of(sections)
    recipe, export = RECIPES[name], _export_config(name, sections, changes["export"])
    own = recipe.student(sections)
    found = chosen(run / "checkpoints", which, own)
    if found.state["fit"] != own and folder.resolve() == run.resolve():
        raise InputError(
            f"expected --output_dir for {found.state['fit']!r}, since {run} is the folder of its student, got none; give one"
        )
    check_hub(export, folder)
    rebuilt = recipe.rebuild(run, sections, changes, found)
    load_student(rebuilt.network, found)
    teacher = {"path": DEMO, **(sections["teacher"] or {}), **changes["teacher"]}["path"]
    report = _report(name, rebuilt, found, teacher, run, folder)
    export_network(folder, rebuilt.network, rebuilt.companion, rebuilt.probe, report, export.dtype)
    push(folder, export)
    return folder


def recipe_of(sections: Mapping[str, Any]) -> str:
    """The recipe whose options the section `method` holds, by their names; InputError for none."""
    keys = set(sections["method"] or {})
    known = {name: {f.name for f in fields(recipe.options)} for name, recipe in RECIPES.items()}
    fitting = sorted((name for name in known if keys and keys <= known[name]), key=lambda name: len(known[name]))
    if not fitting:
        raise InputError(
            f"expected a run of {', '.join(RECIPES)}, got one whose section method has {', '.join(sorted(keys)) or 'nothing'}; "
            "was it written by another version?"
        )
    return fitting[0]


def chosen(folder: Path, which: str, own: str) -> Checkpoint:
    """The checkpoint asked for: of the fit `own` where nothing else is said; InputError where it is missing or damaged."""
    stores = {path.name: CheckpointStore(path) for path in sorted(folder.glob("*")) if path.is_dir()}
    fits = [name for name, store in stores.items() if store.steps()]
    if which == "latest" and own not in fits and fits:
        raise InputError(
            f"expected a checkpoint of {own!r}, the student, in {folder}, got those of {', '.join(fits)} alone; train on "
            f"(--train.resume_from_checkpoint latest), or export one of these: --checkpoint {fits[0]} --output_dir DIR"
        )
    if which in fits or (own in fits and (which == "latest" or which in map(str, stores[own].steps()))):
        found = stores[which].find(strict=True) if which in fits else stores[own].find(which, strict=True)
        if found is not None:
            return found
    return find_checkpoint(folder, which)


def _export_config(name: str, sections: dict[str, Any], given: dict[str, Any]) -> NetworkExportConfig:
    known = [f.name for f in fields(NetworkExportConfig)]
    for key in given:
        if key not in known:
            flags = ", ".join(f"--export.{flag}" for flag in known)
            raise InputError(
                f"expected {flags} for a run of {name}, whose network is one of Transformers, got --export.{key}; drop it"
            )
    return section(NetworkExportConfig, sections, "export", given)


def _report(name: str, rebuilt: Rebuilt, found: Checkpoint, teacher: str, run: Path, folder: Path) -> Report:
    """What is known of the network: the earlier facts where they are of these weights, else what it is and what is missing."""
    recipe, fit, earlier = RECIPES[name], found.state["fit"], read_facts(run)
    checkpoint = {"fit": fit, "step": found.step}
    title = UNTAUGHT.get(fit.rsplit("-", 1)[0], recipe.title)
    taught = teacher if title == recipe.title else None
    results, details, sections = {}, rebuilt.details, {"Results": "None: the run had not come to its evaluation."}
    if earlier.get("results"):
        if earlier.get("student", {}).get("hash") == student_hash(rebuilt.network):
            results, details, sections = earlier["results"], earlier["details"], earlier["sections"]
        elif folder.resolve() == run.resolve():
            raise InputError(
                f"expected --output_dir for the weights of step {found.step}, since {run} holds an export of others with the "
                "results of its evaluation, got none; give one"
            )
        else:
            sections = {"Results": "None: the run's evaluation is not known to be of these weights."}
    return Report(recipe.task, name, title, rebuilt.base, taught, results, details, sections, checkpoint)


def _language_model(run: Path, sections: dict[str, Any], changes: Changes, found: Checkpoint) -> Rebuilt:
    teacher = section(LMTeacherConfig, sections, "teacher", changes["teacher"])
    student = section(LMStudentConfig, sections, "student", changes["student"])
    data, tokenizer = section(TextConfig, sections, "data"), _tokenizer_in(run)
    made = tokenizer is None and teacher.path == student.path == DEMO
    texts = open_texts(data).train if made else []
    vocabulary = sections.get("vocabulary", 0)
    pair = Pair(CAUSAL, teacher, student, texts, vocabulary, data.block_size, 0, CPU, tokenizer=tokenizer)
    if made:  # which is a function of the texts: are they those of the training?
        prompt = data.prompt if found.state["run"]["method"] == GKD.__name__ else 0
        rows, wanted = (
            len(rows_of(texts, pair.tokenizer, data.block_size, prompt)),
            found.state["run"]["number of samples"],
        )
        if rows != wanted:
            raise InputError(
                f"expected the texts that {run} was trained on, from which its tokenizer is made, got {rows} samples at "
                f"{data.path!r} where checkpoint {found.path} had {wanted}; put them back (docstrings: the same Python)"
            )
    taught = found.state["fit"] != TEACHER
    network = pair.student() if taught else pair.teacher(trains=True)
    details = [f"tokenizer: {len(pair.tokenizer):,} tokens"]
    return Rebuilt(
        network, pair.tokenizer, language_model.probe(pair.tokenizer), (student if taught else teacher).path, details
    )


def _tokenizer_in(run: Path) -> Any:
    """The tokenizer that an earlier export left in the run's folder; None without one."""
    if "tokenizer_config.json" not in read_facts(run).get("files", []):
        return None
    from ..networks.pretrained import load_tokenizer

    return load_tokenizer(str(run.resolve()), "RUN")


def _classifier(run: Path, sections: dict[str, Any], changes: Changes, found: Checkpoint) -> Rebuilt:
    role: Literal["teacher", "student"] = "teacher" if found.state["fit"] == TEACHER else "student"
    config = section(ClassifierConfig, sections, role, changes[role])
    data = section(LabelledConfig, sections, "data")
    classes, side = class_names(data), data.resolution
    network = open_classifier(config, role, 0, classes, CPU)
    pixels = torch.linspace(-1.0, 1.0, 2 * 3 * side * side).view(2, 3, side, side)
    details = [f"{len(classes)} classes, images of {side} pixels"]
    return Rebuilt(
        network, classifier.processor(network, side), classifier.probe(network, pixels), config.path, details
    )


def _own_temperature(sections: dict[str, Any]) -> str:
    return classifier.fit_name(section(HintonConfig, sections, "method").temperature, 0)


RECIPES = {
    name: Recipe("text-generation", language_model.TITLES[name], options, lambda _: "student", _language_model)
    for name, options in (("lm_kd", LanguageModelKDConfig), ("gkd", GKDConfig))
}
RECIPES["hinton"] = Recipe("image-classification", classifier.TITLE, HintonConfig, _own_temperature, _classifier)
