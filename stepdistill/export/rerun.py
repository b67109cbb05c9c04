"""`stepdistill export RUN`: the student of a finished or running training, rebuilt from its folder and exported.

The record is `RUN/config.yaml`, the resolved config that every recipe writes. Its sections `teacher`, `student`, `method`
and `export` are read one by one into the dataclasses they came from. Which method it was, the checkpoint says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import CommaList
from ..errors import InputError
from ..families import Model, TeacherConfig, load
from ..methods.add import ADD, ADDConfig
from ..methods.guidance_distill import GuidanceDistill
from ..methods.ladd import LADD, LADDConfig
from ..methods.lcm import LCM, LCMConfig
from ..methods.progressive import Progressive, ProgressiveConfig
from ..networks.denoiser import Denoiser
from ..networks.lora import StudentConfig
from ..training.checkpoint import Checkpoint, CheckpointStore
from ..training.snapshot import check_teacher
from ..training.state import join_state
from .config import CONFIG, ExportConfig, read_config
from .hub import check_hub, push
from .ladd import add_sampling, ladd_sampling
from .lcm import lcm_sampling
from .progressive import guidance_sampling, progressive_sampling
from .sampling import Sampling
from .student import export_student


@dataclass(frozen=True)
class Exported:
    """A method whose students are exported.

    Attributes:
        config: its options.
        section: where config.yaml has them.
        plan: (options, model, whether the student takes guidance, the method's state in the checkpoint) -> Sampling.
    """

    config: type[Any]
    section: str
    plan: Callable[[Any, Model, bool, Mapping[str, Any]], Sampling]


def _rung(config: ProgressiveConfig, model: Model, takes: bool, state: Mapping[str, Any]) -> Sampling:
    return progressive_sampling(config, model, state["ladder"][state["rung"] + 1], takes)


METHODS = {
    LCM.__name__: Exported(LCMConfig, "method", lambda config, model, takes, _: lcm_sampling(config, model, takes)),
    Progressive.__name__: Exported(ProgressiveConfig, "method", _rung),
    LADD.__name__: Exported(LADDConfig, "method", lambda config, model, *_: ladd_sampling(config, model)),
    ADD.__name__: Exported(ADDConfig, "method", lambda config, model, *_: add_sampling(config, model)),
    GuidanceDistill.__name__: Exported(
        ProgressiveConfig, "method", lambda config, model, takes, _: guidance_sampling(config.guidance(), model, takes)
    ),
}
LISTS = ("targets", "formats", "rungs", "times", "probabilities", "warmup_probabilities", "taps", "augmentations")
PARSED: Mapping[str, Callable[[Any], Any]] = dict.fromkeys(LISTS, CommaList.parse)
T = TypeVar("T")


def export_run(
    run: str | Path,
    output_dir: str | Path | None = None,
    checkpoint: str = "latest",
    teacher: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
) -> Path:
    """Exports the student of `run`, its averaged weights where training kept an average; returns the folder written.

    Args:
        run: the run folder, with config.yaml and checkpoints/.
        output_dir: where to write, `run` by default.
        checkpoint: "latest", a step, or a checkpoint's folder. A damaged one is an error, not passed over.
        teacher: fields of TeacherConfig to change, e.g. a path that has moved.
        export: fields of ExportConfig to change.
    """
    run, folder = Path(run), Path(output_dir or run)
    sections = read_config(run)
    teacher_config = _section(TeacherConfig, sections, "teacher", teacher)
    student_config = _section(StudentConfig, sections, "student")
    export_config = _section(ExportConfig, sections, "export", export)
    found = find_checkpoint(run / "checkpoints", checkpoint)
    how = exported(sections, found.state)
    method = _section(how.config, sections, how.section)
    check_hub(export_config, folder)
    model = load(teacher_config)
    check_teacher(found.state.get("teacher", {}), model.denoiser_hash(), f"checkpoint {found.path}")
    student = rebuilt(model, student_config, found)
    state = join_state(found.tensors("method"), found.state.get("method", {}))
    plan = how.plan(method, model, student.takes_guidance, state)
    export_student(folder, model, student, teacher_config, plan, export_config, run)
    push(folder, export_config)
    return folder


def find_checkpoint(folder: Path, which: str) -> Checkpoint:
    """The checkpoint asked for, of all fits of a run; InputError where there is none, or it is damaged."""
    fits = sorted(p for p in folder.glob("*") if p.is_dir() and not p.name.isdigit() and not p.name.startswith("."))
    stores = [store for place in (folder, *fits) if (store := CheckpointStore(place)).steps()]
    if which == "latest" and stores:
        stores = [max(stores, key=lambda store: store.steps()[-1])]
    elif which.isdecimal():
        stores = [store for store in stores if int(which) in store.steps()][-1:] or stores[-1:]
    found = (stores[-1] if stores else CheckpointStore(folder)).find(which, strict=True)
    if found is None:
        raise InputError(f"expected a checkpoint in {folder}, got none; train first, or name another run folder")
    return found


def exported(sections: dict[str, Any], state: Mapping[str, Any]) -> Exported:
    """The method that trained: the one the checkpoint names, else one that has the section's fields."""
    name, keys = state.get("run", {}).get("method"), set(sections["method"] or {})
    if name is None:
        fitting = [n for n, how in METHODS.items() if keys <= {f.name for f in fields(how.config)}]
        name = fitting[0] if fitting else f"one with the fields {', '.join(sorted(keys))}"
    if name not in METHODS:
        raise InputError(
            f"expected a method that exports ({', '.join(METHODS)}), got {name}; name the folder of such a run"
        )
    return METHODS[name]


def _section(cls: type[T], sections: dict[str, Any], name: str, changes: dict[str, Any] | None = None) -> T:
    values = {**(sections.get(name) or {}), **(changes or {})}
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(values) - known:
        raise InputError(
            f"expected the fields {', '.join(sorted(known))} in section {name} of {CONFIG}, got also "
            f"{', '.join(sorted(unknown))}; was it written by another version?"
        )
    return cls(**{k: PARSED[k](v) if k in PARSED and v is not None else v for k, v in values.items()})


def rebuilt(model: Model, config: StudentConfig, checkpoint: Checkpoint) -> Denoiser:
    """The student with the checkpoint's weights, the averaged ones where there are any."""
    saved = checkpoint.tensors("student")
    student = model.denoiser.student(config)
    if config.kind == "full" and saved.keys() - student.state().keys():  # the recipe gave it a guidance input
        student = model.denoiser.student(config, embed_guidance=True)
    load_student(student, checkpoint)
    return student


def load_student(student: Denoiser, checkpoint: Checkpoint) -> None:
    """Puts the checkpoint's weights into the student, and over them the average in `student.ema` if there is one."""
    _copy(checkpoint.tensors("student"), student.state(), checkpoint)
    if average := checkpoint.tensors("student.ema"):
        _copy(average, {name: p.data for name, p in student.named_trainable().items()}, checkpoint)


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], live: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    if saved.keys() != live.keys():
        odd = sorted(saved.keys() ^ live.keys())
        raise InputError(
            f"expected the {len(live)} tensors of this student in {checkpoint.path}, got {len(saved)}; {len(odd)} are in one "
            f"only, first {odd[0]}; do `student` and `teacher` in {CONFIG} belong to this checkpoint?"
        )
    for name, tensor in live.items():
        if saved[name].shape != tensor.shape:
            raise InputError(
                f"expected {name} of shape {tuple(tensor.shape)} in {checkpoint.path}, got {tuple(saved[name].shape)}; is the "
                f"rank in {CONFIG} the one of this checkpoint?"
            )
        tensor.copy_(saved[name])
