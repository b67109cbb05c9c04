"""How a student of latent consistency distillation is sampled: by LCMScheduler."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import InputError
from ..families import Model
from ..methods.lcm import LCMConfig
from .sampling import Sampling, check_table, table_fields, told

LCM_SIGMA_DATA = 0.5  # LCMScheduler's, which no config field of it changes
STEPS = (1, 2, 4, 8)


def lcm_sampling(method: LCMConfig, model: Model, takes_guidance: bool = False) -> Sampling:
    """LCMScheduler on the grid of the training (arXiv 2310.04378), without classifier-free guidance.

    The student has learned that: an adapter all of the range it was trained on at once, one with a guidance input whichever
    scale of the range it is given.

    Args:
        method: what trains it.
        model: the teacher.
        takes_guidance: as the student's :class:`Denoiser` has it.

    Raises InputError where LCMScheduler can't sample what is trained; call it before the training to know in time.
    """
    if method.sigma_data != LCM_SIGMA_DATA:
        raise InputError(
            f"expected sigma_data {LCM_SIGMA_DATA}, which LCMScheduler samples with, got {method.sigma_data}; fix "
            "--method.sigma_data"
        )
    scheduler = _scheduler(method, model)
    grid = set(_grid(method.num_ddim_timesteps, scheduler.config["num_train_timesteps"]))
    steps = tuple(n for n in STEPS if n <= method.num_ddim_timesteps)
    timesteps: dict[str, list[int]] = {}
    for count in steps:
        scheduler.set_timesteps(count)
        timesteps[str(count)] = [int(t) for t in scheduler.timesteps]
        if off := [t for t in timesteps[str(count)] if t not in grid]:
            raise InputError(
                f"LCMScheduler visits {off} at {count} steps, which num_ddim_timesteps did not train; use 50"
            )
    scale, reach = told(method.w_min, method.w_max, takes_guidance)
    low, high = method.w_min + 1.0, method.w_max + 1.0
    return Sampling(
        method="lcm",
        title="LCM",
        kind="latent-consistency",
        scheduler=scheduler,
        steps=steps,
        default_steps=min(4, steps[-1]),
        timesteps=timesteps,
        guidance_scale=scale,
        guidance_range=reach,
        trained=asdict(method),
        guidance_note=f" (up to 1.5 works too); the weights hold guidance w from {method.w_min:g} to {method.w_max:g}, a "
        f"guidance_scale of {low:g} to {high:g} of the base model",
    )


def _grid(points: int, levels: int) -> list[int]:
    return [(i + 1) * (levels // points) - 1 for i in range(points)]  # [19, 39, ..., 999] for 50 of 1000


def _scheduler(method: LCMConfig, model: Model) -> Any:
    from diffusers import LCMScheduler

    fields = table_fields(model)
    try:
        scheduler = LCMScheduler(
            **fields, original_inference_steps=method.num_ddim_timesteps, timestep_scaling=method.timestep_scaling
        )
    except NotImplementedError as error:
        raise InputError(
            f"expected a beta_schedule that LCMScheduler knows, got {fields.get('beta_schedule')!r}; give `trained_betas` "
            "in the teacher's scheduler config instead"
        ) from error
    check_table(scheduler, model)
    return scheduler
