"""How a student of latent consistency distillation is sampled: by LCMScheduler, or on a flow by FlowMatchLCMScheduler."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..diffusion.schedule import Flow, Tabulated
from ..errors import InputError
from ..families import Model
from ..methods.lcm import LCMConfig
from .sampling import Sampling, check_table, flow_lcm_scheduler, lcm_scheduler, table_fields, told

LCM_SIGMA_DATA = 0.5  # LCMScheduler's, which no config field of it changes
STEPS = (1, 2, 4, 8)


def lcm_sampling(method: LCMConfig, model: Model, takes_guidance: bool = False) -> Sampling:
    """The stock LCM scheduler on the grid of the training (arXiv 2310.04378), without classifier-free guidance.

    On a noise table LCMScheduler finds the times by itself. On a flow FlowMatchLCMScheduler makes the same step, without
    c_skip and c_out, which are not trained there either; it is handed the sigmas of the grid.

    The student has learned guidance: an adapter all of the range it was trained on at once, one with a guidance input whichever
    scale of the range it is given.

    Args:
        method: what trains it.
        model: the teacher.
        takes_guidance: as the student's :class:`Denoiser` has it.

    Raises InputError where no stock scheduler can sample what is trained; call it before the training to know in time.
    """
    steps = tuple(n for n in STEPS if n <= method.num_ddim_timesteps)
    timesteps: dict[str, list[int]] = {}
    sigmas: dict[str, list[float]] = {}
    schedule = model.denoiser.schedule
    if isinstance(schedule, Tabulated):
        scheduler = _scheduler(method, model)
        timesteps = {str(count): _visited(scheduler, count, method) for count in steps}
    elif isinstance(schedule, Flow):
        scheduler = flow_lcm_scheduler(model)
        trained = method.grid(schedule)
        sigmas = {
            str(count): [float(s) for s in schedule.sigma(trained[_spread(len(trained) - 1, count)])] for count in steps
        }
    else:
        raise InputError(
            f"expected a noise table or a flow, got {type(schedule).__name__}; no stock scheduler samples it"
        )
    scale, reach = told(method.w_min, method.w_max, takes_guidance, model.usual_guidance)
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
        sigmas=sigmas,
    )


def _spread(points: int, count: int) -> list[int]:
    """`count` of so many points, the first one first, as LCMScheduler spreads them: [0, 12, 25, 37] for 4 of 50."""
    return [i * points // count for i in range(count)]


def _visited(scheduler: Any, count: int, method: LCMConfig) -> list[int]:
    points, total = method.num_ddim_timesteps, scheduler.config["num_train_timesteps"]
    grid = {(i + 1) * (total // points) - 1 for i in range(points)}  # {19, 39, ..., 999} for 50 of 1000
    scheduler.set_timesteps(count)
    found = [int(t) for t in scheduler.timesteps]
    if off := [t for t in found if t not in grid]:
        raise InputError(f"LCMScheduler visits {off} at {count} steps, which num_ddim_timesteps did not train; use 50")
    return found


def _scheduler(method: LCMConfig, model: Model) -> Any:
    if method.sigma_data != LCM_SIGMA_DATA:
        raise InputError(
            f"expected sigma_data {LCM_SIGMA_DATA}, which LCMScheduler samples with, got {method.sigma_data}; fix "
            "--method.sigma_data"
        )
    scheduler = lcm_scheduler(
        table_fields(model),
        original_inference_steps=method.num_ddim_timesteps,
        timestep_scaling=method.timestep_scaling,
    )
    check_table(scheduler, model)
    return scheduler
