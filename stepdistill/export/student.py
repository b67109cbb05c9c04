"""From a trained student to a run folder that stock Diffusers loads: weights, scheduler, facts and a model card.

Everything is written into a hidden folder, checked there and moved into place as a whole: a failed export leaves an old one
alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import InputError
from ..families import Model, TeacherConfig
from ..networks.denoiser import Denoiser
from .card import base_facts, write_card
from .config import ExportConfig
from .folder import FACTS, TEMP, commit, put_back
from .full import WholeNetwork
from .kohya import kohya_layout
from .licence import licence
from .lines import loading_lines
from .lora import AdapterFile, diffusers_layout
from .part import Part, component, files_of
from .sampling import Sampling
from .verify import verify

SCHEMA = 3
INDEX = "model_index.json"
UNCONDITIONAL = "DDPMPipeline"  # also for DDIMPipelines, which put a DDIMScheduler in the place of any other
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_student(
    folder: str | Path,
    model: Model,
    student: Denoiser,
    teacher: TeacherConfig,
    plan: Sampling,
    config: ExportConfig | None = None,
    run: str | Path | None = None,
) -> Path:
    """Writes weights, scheduler config, stepdistill.json and README.md into `folder`; other files there stay.

    A LoRA student becomes pytorch_lora_weights.safetensors (and lora_kohya.safetensors, where asked for), a full one the
    folder `unet/`.

    Args:
        folder: the run folder, made if missing.
        model: the teacher, opened.
        student: the network to export, with the weights it has now (enter `ema.applied()` for the average).
        teacher: which checkpoint `model` is, for the card and for a full verification.
        plan: how the student is sampled, from what trained it: scheduler, steps and guidance.
        config: dtype, formats and verification.
        run: where samples/ and table.md for the card lie, `folder` by default.

    Raises:
        ExportError: when what was written does not load back as the student.
        InputError: when it can't be written.
    """
    folder, config = Path(folder), config or ExportConfig()
    parts = parts_of(model, student, teacher, config)
    temp = folder / TEMP
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        put_back(folder)
        for part in parts:
            part.save(temp, DTYPES[config.dtype])
            verify(part, temp, config.verify)
        plan.scheduler.save_pretrained(temp / "scheduler")
        info = facts(model, student, teacher, plan, config, temp, parts)
        if info["takes"] == "nothing":
            _write_index(temp, info["weights"]["network"], info["scheduler"])
        write_card(temp, info, loading_lines(folder, info), Path(run or folder))
        written = {str(p.relative_to(temp)) for p in temp.rglob("*") if p.is_file()}
        info["files"] = sorted({*written, FACTS})
        (temp / FACTS).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        commit(temp, folder)
    except OSError as error:
        raise InputError(
            f"expected to write the export into {folder}, got: {error}; free space or fix permissions"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def parts_of(model: Model, student: Denoiser, teacher: TeacherConfig, config: ExportConfig) -> list[Part]:
    """What is to be written for this student: an adapter by itself only where a stock pipeline loads one."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    pipeline = model.pipeline(student)
    if student.adapters is None or not isinstance(pipeline, LoraBaseMixin):
        return [WholeNetwork(model, student)]
    layouts = {"diffusers": lambda: diffusers_layout(component(pipeline)), "kohya": lambda: kohya_layout(pipeline)}
    return [AdapterFile(model, student, teacher, layouts[name]()) for name in config.formats]


def facts(
    model: Model,
    student: Denoiser,
    teacher: TeacherConfig,
    plan: Sampling,
    config: ExportConfig,
    saved: Path,
    parts: list[Part],
) -> dict[str, Any]:
    """The contents of stepdistill.json: what a program needs to sample the student and to say where it comes from."""
    takes = _takes(model)
    files = {str(p.relative_to(saved)): _sha256(p) for part in parts for p in files_of(part, saved)}
    whole = [part for part in parts if isinstance(part, WholeNetwork)]
    network = {"folder": whole[0].name, "class": type(whole[0].student.module).__name__} if whole else None
    return {
        "schema": SCHEMA,
        "method": plan.method,
        "title": plan.title,
        "kind": plan.kind,
        "pipeline": UNCONDITIONAL if takes == "nothing" else type(model.pipeline()).__name__,
        "takes": takes,
        "size": None if model.resolution == model.stock_resolution else model.resolution,
        "steps": list(plan.steps),
        "default_steps": plan.default_steps,
        "timesteps": plan.timesteps,
        "sigmas": plan.sigmas,
        "guidance_scale": plan.guidance_scale,
        "guidance_range": plan.guidance_range and list(plan.guidance_range),
        "guidance_note": plan.guidance_note,
        "scheduler": type(plan.scheduler).__name__,
        "trained": plan.trained,
        "base_model": base_facts(model, teacher),
        "licence": licence(teacher),
        "student": _student_facts(student),
        "weights": {"dtype": config.dtype, "verified": config.verify, "network": network, "files": files},
        "versions": {"stepdistill": __version__, **{p: version(p) for p in ("torch", "diffusers", "peft")}},
    }


def _takes(model: Model) -> str:
    """What a picture is asked for with: "prompt", "class" or "nothing"."""
    cond = model.conditions(model.examples)
    return "class" if "class_labels" in cond else "prompt" if cond else "nothing"


def _write_index(folder: Path, network: dict[str, str], scheduler: str) -> None:
    """model_index.json, with which `DDPMPipeline.from_pretrained(folder)` opens the network and the scheduler beside it."""
    index = {
        "_class_name": UNCONDITIONAL,
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", scheduler],
        network["folder"]: ["diffusers", network["class"]],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _student_facts(student: Denoiser) -> dict[str, Any]:
    if student.adapters is None or student.adapter is None:
        return {"kind": "full", "parameters": sum(p.numel() for p in student.module.parameters())}
    spec = student.adapters.specs[student.adapter]
    modules = len(student.adapters.scalings(student.adapter))
    return {"kind": "lora", "rank": spec.rank, "alpha": spec.alpha, "targets": list(spec.targets), "modules": modules}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
