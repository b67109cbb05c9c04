"""`stepdistill export RUN`: the student of a finished or running training, rebuilt from its folder and exported.

The record is `RUN/config.yaml`, the resolved config that every recipe writes. Its sections `teacher`, `student`, `method`
and `export` are read one by one into the dataclasses they came from; the method is the one whose config has these fields.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import CommaList
from ..errors import InputError
from ..families import TeacherConfig, load
from ..methods.lcm import LCMConfig
from ..networks.denoiser import Denoiser
from ..networks.lora import StudentConfig
from ..training.checkpoint import Checkpoint, CheckpointStore
from .config import CONFIG, ExportConfig, read_config
from .student import export_student

METHODS = (LCMConfig,)
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
    run = Path(run)
    sections = read_config(run)
    teacher_config = replace(_section(TeacherConfig, sections, "teacher"), **(teacher or {}))
    student_config = _section(StudentConfig, sections, "student")
    export_config = replace(_section(ExportConfig, sections, "export"), **(export or {}))
    method = _section(method_class(sections), sections, "method")
    found = CheckpointStore(run / "checkpoints").find(checkpoint, strict=True)
    if found is None:
        raise InputError(
            f"expected a checkpoint in {run / 'checkpoints'}, got none; train first, or name another run folder"
        )
    model = load(teacher_config)
    student = model.denoiser.with_lora(student_config.spec(model.denoiser.lora_targets))
    load_student(student, found)
    return export_student(output_dir or run, model, student, teacher_config, method, export_config, run)


def method_class(sections: dict[str, Any]) -> type[LCMConfig]:
    """The config class of the method that trained the run: the one that has every field of the section."""
    keys = set(sections["method"] or {})
    for method in METHODS:
        if keys <= {f.name for f in fields(method)}:
            return method
    raise InputError(
        f"expected the config of a method that exports ({', '.join(m.__name__ for m in METHODS)}), got {sorted(keys)}"
    )


def _section(cls: type[T], sections: dict[str, Any], name: str) -> T:
    values = dict(sections.get(name) or {})
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(values) - known:
        raise InputError(
            f"expected the fields {', '.join(sorted(known))} in section {name} of {CONFIG}, got also "
            f"{', '.join(sorted(unknown))}; was it written by another version?"
        )
    if values.get("targets") is not None:
        values["targets"] = CommaList.parse(values["targets"])
    return cls(**values)


@torch.no_grad()
def load_student(student: Denoiser, checkpoint: Checkpoint) -> None:
    """Puts the checkpoint's weights into the student: the average in `student.ema` if there is one, else `student`."""
    saved = checkpoint.tensors("student.ema") or checkpoint.tensors("student")
    named = student.named_trainable()
    if saved.keys() != named.keys():
        odd = sorted(saved.keys() ^ named.keys())
        raise InputError(
            f"expected the {len(named)} tensors of this student in {checkpoint.path}, got {len(saved)}; {len(odd)} are in one "
            f"only, first {odd[0]}; do `student` and `teacher` in {CONFIG} belong to this checkpoint?"
        )
    for name, parameter in named.items():
        if saved[name].shape != parameter.shape:
            raise InputError(
                f"expected {name} of shape {tuple(parameter.shape)} in {checkpoint.path}, got {tuple(saved[name].shape)}; "
                f"is the rank in {CONFIG} the one of this checkpoint?"
            )
        parameter.copy_(saved[name])
