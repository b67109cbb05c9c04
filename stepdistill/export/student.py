"""From a trained student to a run folder that stock Diffusers loads: adapter, scheduler, facts and a model card.

Everything is written into a hidden folder, checked there and renamed into place: a failed export leaves an old one alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import InputError
from ..families import Model, TeacherConfig
from ..methods.lcm import LCMConfig
from ..networks.denoiser import Denoiser
from .card import base_model, loading_lines, write_card
from .config import ExportConfig
from .lora import adapter_of, save_lora
from .sampling import Sampling, sampling
from .verify import component, verify

SCHEMA = 1
FACTS = "stepdistill.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEMP = ".exporting"


def export_student(
    folder: str | Path,
    model: Model,
    student: Denoiser,
    teacher: TeacherConfig,
    method: LCMConfig,
    config: ExportConfig | None = None,
    run: str | Path | None = None,
) -> Path:
    """Writes adapter, scheduler config, stepdistill.json and README.md into `folder`; other files there stay.

    Args:
        folder: the run folder, made if missing.
        model: the teacher, opened.
        student: the network to export, with the weights it has now (enter `ema.applied()` for the average).
        teacher: which checkpoint `model` is, for the card and for a full verification.
        method: what trained the student; it decides the scheduler, the steps and the guidance.
        config: dtype and verification.
        run: where samples/ and table.md for the card lie, `folder` by default.

    Raises:
        ExportError: when what was written does not load back as the student.
        InputError: when it can't be written, or the method's grid can't be sampled by a stock scheduler.
    """
    folder, config = Path(folder), config or ExportConfig()
    plan = sampling(method, model)
    temp = folder / TEMP
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        weights = save_lora(student, temp, DTYPES[config.dtype], component(model.pipeline(student)))
        verify(temp, model, student, teacher, config.verify)
        plan.scheduler.save_pretrained(temp / "scheduler")
        info = facts(student, teacher, plan, config, weights)
        lines = loading_lines(folder, teacher, plan.default_steps, plan.guidance_scale)
        write_card(temp, info, lines, Path(run or folder))
        (temp / FACTS).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        _move(temp, folder)
    except OSError as error:
        raise InputError(
            f"expected to write the export into {folder}, got: {error}; free space or fix permissions"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def facts(
    student: Denoiser, teacher: TeacherConfig, plan: Sampling, config: ExportConfig, weights: Path
) -> dict[str, Any]:
    """The contents of stepdistill.json: what a program needs to sample the student and to say where it comes from."""
    adapters, name = adapter_of(student)
    spec = adapters.specs[name]
    return {
        "schema": SCHEMA,
        "method": plan.method,
        "steps": list(plan.steps),
        "default_steps": plan.default_steps,
        "timesteps": plan.timesteps,
        "guidance_scale": plan.guidance_scale,
        "scheduler": type(plan.scheduler).__name__,
        "trained": plan.trained,
        "base_model": {
            "name": base_model(teacher),
            "path": teacher.path,
            "revision": teacher.revision,
            "variant": teacher.variant,
            "vae": teacher.vae,
        },
        "student": {
            "kind": "lora",
            "rank": spec.rank,
            "alpha": spec.alpha,
            "targets": list(spec.targets),
            "modules": len(adapters.scalings(name)),
        },
        "weights": {
            "file": weights.name,
            "dtype": config.dtype,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "verified": config.verify,
        },
        "versions": {"stepdistill": __version__, **{p: version(p) for p in ("torch", "diffusers", "peft")}},
    }


def _move(source: Path, folder: Path) -> None:
    """Renames every file of `source` to its place in `folder`, the facts last: where they are, all else is."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: (p.name == FACTS, str(p)))
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
