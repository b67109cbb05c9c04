"""`stepdistill export RUN`: the student of a finished or running training, rebuilt from its folder and exported.

The record is `RUN/config.yaml`, the resolved config that every recipe writes. Its sections `teacher`, `student`, `method`
and `export` are read one by one into the dataclasses they came from. Which method it was, the checkpoint says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..families import Model, TeacherConfig, load
from ..methods.add import ADD, ADDConfig
from ..methods.guidance_distill import GuidanceDistill
from ..methods.ladd import LADD, LADDConfig
from ..methods.lcm import LCM, LCMConfig
from ..methods.progressive import Progressive, ProgressiveConfig
from ..networks.denoiser import Denoiser
from ..networks.lora import StudentConfig
from ..training.checkpoint import Checkpoint
from ..training.snapshot import check_teacher
from ..training.state import join_state
from .config import ExportConfig, read_config
from .hub import check_hub, push
from .ladd import add_sampling, ladd_sampling
from .lcm import lcm_sampling
from .progressive import guidance_sampling, progressive_sampling
from .reading import find_checkpoint, load_student, section
from .rerun_kd import export_distilled, is_distilled
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


def export_run(
    run: str | Path,
    output_dir: str | Path | None = None,
    checkpoint: str = "latest",
    teacher: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
) -> Path:
    """Exports the student of `run`, its averaged weights where training kept an average; returns the folder written.

    Args:
        run: the run folder, with config.yaml and checkpoints/.
        output_dir: where to write, `run` by default.
        checkpoint: "latest", a step, or a checkpoint's folder. A damaged one is an error, not passed over.
        teacher: fields of TeacherConfig to change, e.g. a path that has moved.
        export: fields of ExportConfig to change.
        student: fields to change of a student that has a path of its own, as those of classic distillation have.
    """
    run, folder = Path(run), Path(output_dir or run)
    sections = read_config(run)
    if is_distilled(sections):
        changes = {"teacher": teacher or {}, "student": student or {}, "export": export or {}}
        return export_distilled(run, folder, sections, checkpoint, changes)
    if student:
        raise InputError(
            f"expected --teacher.path alone for {run}, whose student is made from its teacher, got --student.path; drop it"
        )
    teacher_config = section(TeacherConfig, sections, "teacher", teacher)
    student_config = section(StudentConfig, sections, "student")
    export_config = section(ExportConfig, sections, "export", export)
    found = find_checkpoint(run / "checkpoints", checkpoint)
    how = exported(sections, found.state)
    method = section(how.config, sections, how.section)
    check_hub(export_config, folder)
    model = load(teacher_config)
    check_teacher(found.state.get("teacher", {}), model.denoiser_hash(), f"checkpoint {found.path}")
    network = rebuilt(model, student_config, found)
    state = join_state(found.tensors("method"), found.state.get("method", {}))
    plan = how.plan(method, model, network.takes_guidance, state)
    export_student(folder, model, network, teacher_config, plan, export_config, run)
    push(folder, export_config)
    return folder


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


def rebuilt(model: Model, config: StudentConfig, checkpoint: Checkpoint) -> Denoiser:
    """The student with the checkpoint's weights, the averaged ones where there are any."""
    saved = checkpoint.tensors("student")
    student = model.denoiser.student(config)
    if config.kind == "full" and saved.keys() - student.state().keys():  # the recipe gave it a guidance input
        student = model.denoiser.student(config, embed_guidance=True)
    load_student(student, checkpoint)
    return student
