"""`stepdistill export RUN` for runs of classic distillation: a network of Transformers, from config.yaml and a checkpoint.

A run holds more than its student: the control group, students of further seeds, a teacher that was trained in it. Each is a
fit with checkpoints of its own, and is exported as what it is. Results of the run go with the weights that they were measured
on, which the run's stepdistill.json knows by a hash; other weights have none, and their card says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..kd.distilbert import DistilBERTConfig, ShallowConfig
from ..kd.distillm import DistiLLMConfig
from ..kd.gkd import GKDConfig
from ..kd.hinton import HintonConfig
from ..kd.language_model import LanguageModelKDConfig
from ..kd.minillm import MiniLLMConfig
from ..kd.pair import DEMO
from ..kd.tinybert import TinyBERTConfig
from ..training.checkpoint import Checkpoint, CheckpointStore
from . import classifier, language_model, masked_lm, text_classifier
from .config import NetworkExportConfig
from .folder import read_facts
from .hub import check_hub, push
from .reading import find_checkpoint, load_student, section
from .rebuild import (
    TEACHER,
    TUNED,
    Changes,
    Rebuilt,
    image_classifier_of,
    language_model_of,
    masked_lm_of,
    text_classifier_of,
)
from .transformer import Report, export_network, student_hash

UNTAUGHT = {  # fits without a teacher: the title of a card
    TEACHER: "Teacher, trained for a distillation",
    "sft": "Student before its distillation, fine-tuned on text",
    "control": "Control group of a distillation, trained without a teacher",
    "labelsalone": "Control group of a distillation, trained without a teacher",
    TUNED: "Teacher, fine-tuned for a distillation",
}
PARTLY = {  # taught, and not the student that a recipe exports: the same
    "random": f"{masked_lm.TITLE}, begun with random weights",
    "general": "Text classifier amid its distillation, after general text: its head is untrained",
    "intermediate": "Text classifier amid its distillation, before the task's answers: its head is untrained",
}


@dataclass(frozen=True)
class Recipe:
    """A recipe of classic distillation.

    Attributes:
        title: of the student's card.
        options: what the section `method` came from.
        student: (sections) -> the fit whose student the recipe exports.
        rebuild: (run, sections, changes, checkpoint) -> the network that this checkpoint is of.
    """

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
    stem = fit if fit in UNTAUGHT else fit.rsplit("-", 1)[0]
    title = UNTAUGHT.get(stem) or PARTLY.get(fit, recipe.title)
    taught = None if stem in UNTAUGHT else teacher
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
    return Report(rebuilt.task, name, title, rebuilt.base, taught, results, details, sections, checkpoint)


def _own_temperature(sections: dict[str, Any]) -> str:
    return classifier.fit_name(section(HintonConfig, sections, "method").temperature, 0)


def is_distilled(sections: Mapping[str, Any]) -> bool:
    """Whether the run is of classic distillation: its student has a path of its own, or is made of its teacher's layers."""
    student = set(sections["student"] or {})
    return "path" in student or bool(student and student <= {f.name for f in fields(ShallowConfig)})


CAUSAL_OPTIONS = {
    "lm_kd": LanguageModelKDConfig, "gkd": GKDConfig, "minillm": MiniLLMConfig, "distillm": DistiLLMConfig,
}  # fmt: skip
RECIPES = {
    **{
        name: Recipe(language_model.TITLES[name], options, lambda _: "student", language_model_of)
        for name, options in CAUSAL_OPTIONS.items()
    },
    "hinton": Recipe(classifier.TITLE, HintonConfig, _own_temperature, image_classifier_of),
    "distilbert": Recipe(masked_lm.TITLE, DistilBERTConfig, lambda _: "student", masked_lm_of),
    "tinybert": Recipe(text_classifier.TITLE, TinyBERTConfig, lambda _: "prediction", text_classifier_of),
}
