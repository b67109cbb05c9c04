"""How a rung of a ladder is sampled: by DDIM, or on a flow by Euler, at exactly the times it was trained at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..diffusion.schedule import Flow, Tabulated
from ..errors import InputError
from ..families import Model, TeacherConfig
from ..methods.guidance_distill import GuidanceDistillConfig
from ..methods.progressive import ProgressiveConfig
from .card import base_facts
from .folder import RUNGS, read_facts, rungs_in, same_base
from .sampling import Sampling, check_table, levels, table_fields, told


def progressive_sampling(method: ProgressiveConfig, model: Model, steps: int, takes_guidance: bool = False) -> Sampling:
    """The stock scheduler on the grid of the rung of `steps` steps (arXiv 2202.00512), without classifier-free guidance.

    On a noise table DDIMScheduler with trailing timesteps, ending at clean data; on a flow FlowMatchEulerDiscreteScheduler,
    with the rung's sigmas to be handed to the pipeline.

    Args:
        method: what trains it.
        model: the first teacher.
        steps: of the rung.
        takes_guidance: as the student's :class:`Denoiser` has it.

    Raises InputError where no stock scheduler visits the grid; call it before the training to know in time.
    """
    schedule = model.denoiser.schedule
    grid = method.grid(schedule, steps)
    timesteps: dict[str, list[int]] = {}
    sigmas: dict[str, list[float]] = {}
    if isinstance(schedule, Tabulated):
        scheduler = _ddim(model)
        scheduler.set_timesteps(steps)
        timesteps[str(steps)] = [int(t) for t in scheduler.timesteps]
        trained = schedule.index(grid[:-1])
        if timesteps[str(steps)] != [round(float(i)) for i in trained] or not torch.equal(trained, trained.round()):
            raise InputError(
                f"expected {steps} steps that DDIMScheduler visits, got {timesteps[str(steps)]} there and "
                f"{trained.tolist()} in training; use a number that divides {schedule.levels}"
            )
    elif isinstance(schedule, Flow):
        scheduler = _euler(model)
        sigmas[str(steps)] = [float(s) for s in schedule.sigma(grid[:-1])]
    else:
        raise InputError(
            f"expected a noise table or a flow, got {type(schedule).__name__}; no stock scheduler samples it"
        )
    scale, reach = told(method.w_min, method.w_max, takes_guidance, model.usual_guidance)
    return Sampling(
        method="progressive",
        title="Progressive distillation",
        kind="progressively distilled",
        scheduler=scheduler,
        steps=(steps,),
        default_steps=steps,
        timesteps=timesteps,
        guidance_scale=scale,
        guidance_range=reach,
        trained={**asdict(method), "rungs": list(method.ladder())},
        guidance_note=_held(method.w_min),
        sigmas=sigmas,
    )


def check_rungs(folder: str | Path, model: Model, teacher: TeacherConfig, plans: Mapping[int, Sampling]) -> None:
    """InputError for a run folder with rungs of another teacher or ladder: with this run's they would pass for one ladder.

    Args:
        folder: the run folder; it need not exist.
        model: the teacher, opened.
        teacher: which checkpoint it is.
        plans: this run's, by their numbers of steps.
    """
    place, rungs = Path(folder) / RUNGS, rungs_in(Path(folder))
    base = base_facts(model, teacher) if rungs else {}  # which reads all weights
    trained = dict(next(iter(plans.values())).trained)
    for rung in rungs:
        facts = read_facts(rung)
        own, options = facts.get("base_model", {}), facts.get("trained", {})
        wanted, got = f"rungs of {base['name']}", f"{rung.name} of {own.get('name', 'an unknown teacher')}"
        if same_base(own, base):
            odd = sorted(key for key in trained.keys() & options.keys() if trained[key] != options[key])
            if not odd and int(rung.name) in plans:
                continue
            wanted += f" with {', '.join(f'{key} {trained[key]}' for key in odd) or f'{list(plans)} steps'}"
            got += f" with {', '.join(f'{key} {options[key]}' for key in odd)}" if odd else ""
        elif own.get("name") == base["name"]:
            got += f" with other weights, at {own.get('path')}"
        raise InputError(
            f"expected {wanted} alone in {str(place)!r}, got {got}; choose another --output_dir, or move {str(place)!r} away"
        )


def guidance_sampling(method: GuidanceDistillConfig, model: Model, takes_guidance: bool = False) -> Sampling:
    """The teacher's own scheduler, without classifier-free guidance, which the student holds (arXiv 2210.03142)."""
    scheduler = model.pipeline().scheduler
    scheduler = type(scheduler).from_config(scheduler.config)
    scale, reach = told(method.w_min, method.w_max, takes_guidance, model.usual_guidance)
    steps, timesteps = (50, 25), dict[str, list[int]]()
    # those of a flow may depend on the image's size
    for count in steps if isinstance(model.denoiser.schedule, Tabulated) else ():
        scheduler.set_timesteps(count)
        timesteps[str(count)] = [int(t) for t in scheduler.timesteps]
    return Sampling(
        method="guidance-distillation",
        title="Guidance distillation",
        kind="guidance-distilled",
        scheduler=scheduler,
        steps=steps,
        default_steps=steps[0],
        timesteps=timesteps,
        guidance_scale=scale,
        guidance_range=reach,
        trained=asdict(method),
        guidance_note=_held(method.w_min),
    )


def _held(w: float) -> str:
    return f"; the weights hold a guidance_scale of {w + 1:g} of the base model" if w else ""


def _ddim(model: Model) -> Any:
    from diffusers import DDIMScheduler

    fields = table_fields(model)
    try:
        scheduler = DDIMScheduler(**fields, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    except NotImplementedError as error:
        raise InputError(
            f"expected a beta_schedule that DDIMScheduler knows, got {fields.get('beta_schedule')!r}; give `trained_betas` "
            "in the teacher's scheduler config instead"
        ) from error
    check_table(scheduler, model)
    return scheduler


def _euler(model: Model) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels(model), shift=1.0, use_dynamic_shifting=False)
