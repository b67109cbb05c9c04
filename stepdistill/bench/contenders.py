"""Who is compared: the teacher and its students, each a stock Diffusers pipeline as its files say it is to be used.

Every contender has a denoiser and a scheduler of its own; text encoders and autoencoder are the teacher's where the student was
made from the teacher's checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..export.folder import FACTS, RUNGS, rung_folders
from ..families import TeacherConfig
from .features import Images, hash_weights
from .generate import denoiser_of, generate, latent_shape
from .opening import open_pipeline, open_student
from .plan import Plan
from .rows import TEACHER, Cell

USUAL = (8, 4, 2, 1)  # steps
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Contender:
    """A pipeline and how it is meant to be called.

    Attributes:
        name: of its cells.
        pipe: stock, ready to be called.
        weights: a hash of all its weights and of its scheduler.
        facts: its stepdistill.json; {} for the teacher and for students from elsewhere.
        rung: whether it is one of several under one name, a ladder, and sampled in its own number of steps alone.
    """

    name: str
    pipe: Any
    weights: str
    facts: dict[str, Any] = field(default_factory=dict)
    rung: bool = False
    _schedules: dict[int, dict[str, Any]] = field(default_factory=dict)

    def steps(self, asked: Sequence[int] = ()) -> tuple[int, ...]:
        """The numbers of steps that it is sampled in; where none are asked for, those that it is made for, or the usual."""
        own = tuple(self.facts.get("steps", ()))
        if self.rung:
            return tuple(k for k in own if not asked or k in asked)
        return tuple(asked) or own or USUAL

    def schedule(self, steps: int) -> dict[str, Any]:
        """What the pipeline is told beside the number of steps: {} where its scheduler then visits what it should.

        Otherwise the timesteps or sigmas that stepdistill.json has for so many. InputError for steps that it refuses.
        """
        if steps not in self._schedules:
            self._schedules[steps] = self._schedule(steps)
        return self._schedules[steps]

    def _schedule(self, steps: int) -> dict[str, Any]:
        for name in ("sigmas", "timesteps"):
            exact = self.facts.get(name, {}).get(str(steps))
            if exact is not None and (name == "sigmas" or self._visited(steps) != exact):
                self._check_takes(name)
                return {name: exact}
        self._visited(steps)
        return {}

    def _check_takes(self, name: str) -> None:
        for part in (type(self.pipe).__call__, self.pipe.scheduler.set_timesteps):
            if name not in inspect.signature(part).parameters:
                raise InputError(
                    f"expected a pipeline and a scheduler that take the {name} that {FACTS} of --student {self.name} has, got "
                    f"{type(self.pipe).__name__} and {type(self.pipe.scheduler).__name__}; write the export again"
                )

    def _visited(self, steps: int) -> list[float] | None:
        """The scheduler's own timesteps; None where they depend on the size of the image."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        if scheduler.config.get("use_dynamic_shifting"):
            return None
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise InputError(
                f"expected a number of steps that the {type(scheduler).__name__} of {self.name} takes, got {steps} "
                f"({' '.join(str(error).split())[:200]}); fix --{'teacher_steps or --' * (self.name == TEACHER)}steps"
            ) from error
        return [float(t) for t in scheduler.timesteps]

    def note(self, cell: Cell) -> str | None:
        """A sentence on a cell that this student was not made for."""
        steps, reach = self.facts.get("steps"), self.facts.get("guidance_range")
        if steps and cell.steps not in steps:
            return f"{cell}: beyond the steps that this student is made for ({', '.join(map(str, steps))})."
        if reach and not reach[0] <= cell.guidance <= reach[1]:
            return f"{cell}: beyond the guidance that this student is made for ({reach[0]:g} to {reach[1]:g})."
        return None

    def images(self, cell: Cell, prompts: Sequence[str], plan: Plan, start: int = 0) -> Images:
        """uint8 [N, H, W, 3] of N prompts in one call of the pipeline; `start` is the index of the first one's noise."""
        return generate(
            self.pipe,
            prompts,
            steps=cell.steps,
            guidance_scale=cell.guidance,
            seed=plan.seed,
            batch_size=len(prompts),
            start_index=start,
            **self.schedule(cell.steps),
            **plan.options,
        )


def open_contenders(
    teacher: str, students: Sequence[str], dtype: str = "fp32", variant: str | None = None, device: Any = "cpu"
) -> list[Contender]:
    """The teacher, then the students in their order, under names of their own.

    Args:
        teacher: a Diffusers folder, hub id, single file, or "demo".
        students: run folders (with stepdistill.json; of a ladder each rung is a contender), or folders and hub ids of
            Diffusers pipelines of few steps.
        dtype: fp32, fp16 or bf16, of all weights.
        variant: of the teacher's files, e.g. fp16.
        device: where all of them go.

    Raises InputError for what can't be opened, and for models that differ in the size of their latents.
    """
    config = TeacherConfig(teacher, variant=variant)
    first = open_pipeline(config, "--teacher", DTYPES[dtype])
    names, known = {TEACHER}, dict[int, str]()
    found = [Contender(TEACHER, first, weights_of(first, known))]
    for path in students:
        name, rungs = unique_name(path, names), rung_folders(Path(path).expanduser())
        for place in [str(rung) for rung in rungs] or [path]:
            pipe, facts = open_student(place, first, config, DTYPES[dtype])
            found.append(Contender(name, pipe, weights_of(pipe, known), facts, rung=bool(rungs)))
    _check_alike(found)
    for contender in found:
        contender.pipe.to(device)
    return found


def weights_of(pipe: Any, known: dict[int, str]) -> str:
    """16 hex digits over the weights of all parts and the scheduler; `known` keeps the parts' by identity."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and id(part) not in known:
            known[id(part)] = hash_weights(part)
    parts = {name: known[id(part)] for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    facts = (type(pipe).__name__, sorted(parts.items()), type(pipe.scheduler).__name__, sorted(scheduler.items()))
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def unique_name(path: str, names: set[str]) -> str:
    """The last part of a path, numbered where it is taken, as a name that is also one of a file, on any disk.

    A number, such as a rung's or that of a seed, says little: it comes with the name of the folder that it is in.
    """
    folder = Path(path).expanduser().resolve()
    of = folder.parents[1] if folder.parent.name == RUNGS else folder.parent
    stem = (f"{of.name}-{folder.name}" if folder.name.isdecimal() else folder.name).replace(" ", "_")
    name, number = stem, 2
    while name.casefold() in names:
        name, number = f"{stem}-{number}", number + 1
    names.add(name.casefold())
    return name


def _check_alike(contenders: Sequence[Contender]) -> None:
    """InputError where images could not start from the same noise."""
    shapes = {}
    for contender in contenders:
        try:
            shapes[contender.name] = latent_shape(denoiser_of(contender.pipe), contender.pipe, {})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"expected a denoiser with in_channels and sample_size in its config, got none in {contender.name} "
                f"({type(contender.pipe).__name__}); this family can't be compared yet"
            ) from error
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} {c}x{h}x{w}" for name, (c, h, w) in shapes.items())
        raise InputError(
            f"expected models of one resolution, whose images start from the same noise, got latents of {said}; compare "
            "students with the teacher that they were made from"
        )


def side_of(contender: Contender, plan: Plan) -> int:
    """Side of the images in pixels; InputError where they are not square."""
    _, h, w = latent_shape(denoiser_of(contender.pipe), contender.pipe, plan.options)
    if h != w:
        raise InputError(f"expected square images, got latents of {h}x{w} from {contender.name}; give --resolution")
    return h * int(contender.pipe.vae_scale_factor)
