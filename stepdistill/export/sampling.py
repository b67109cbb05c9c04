"""How a student is sampled: the stock scheduler that visits the times it was trained at, steps and guidance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import InputError
from ..families import Model
from ..methods.lcm import LCMConfig

LCM_SIGMA_DATA = 0.5  # LCMScheduler's, which no config field of it changes
STEPS = (1, 2, 4, 8)
GUIDANCE = 8.0  # of a student that is told it, where its training reaches so far


@dataclass(frozen=True)
class Sampling:
    """The sampling side of a method.

    Attributes:
        method: its name, e.g. "lcm".
        scheduler: a stock Diffusers scheduler, ready to be saved.
        steps: step counts the student is meant for.
        default_steps: the one that examples use.
        timesteps: step count -> native timesteps that the scheduler visits.
        guidance_scale: what the pipeline is called with; 1.0 means no classifier-free guidance.
        guidance_range: what it may be called with, for a student that is told it; None for one that is not.
        trained: what the method was configured with.
    """

    method: str
    scheduler: Any
    steps: tuple[int, ...]
    default_steps: int
    timesteps: dict[str, list[int]]
    guidance_scale: float
    guidance_range: tuple[float, float] | None
    trained: dict[str, Any]


def sampling(method: LCMConfig, model: Model, takes_guidance: bool = False) -> Sampling:
    """The sampling of a student trained by `method` from `model`; `takes_guidance` as its :class:`Denoiser` has it."""
    return lcm_sampling(method, model, takes_guidance)


def lcm_sampling(method: LCMConfig, model: Model, takes_guidance: bool = False) -> Sampling:
    """LCMScheduler on the grid of the training (arXiv 2310.04378), without classifier-free guidance.

    The student has learned that: an adapter all of the range it was trained on at once, one with a guidance input whichever
    scale of the range it is given.

    Raises InputError where LCMScheduler can't sample what is trained; call it before the training to know in time.
    """
    if method.sigma_data != LCM_SIGMA_DATA:
        raise InputError(
            f"expected sigma_data {LCM_SIGMA_DATA}, which LCMScheduler samples with, got {method.sigma_data}; fix "
            "--method.sigma_data"
        )
    scheduler = _lcm_scheduler(method, model)
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
    reach = (method.w_min + 1.0, method.w_max + 1.0) if takes_guidance else None
    scale = min(max(GUIDANCE, reach[0]), reach[1]) if reach else 1.0
    return Sampling("lcm", scheduler, steps, min(4, steps[-1]), timesteps, scale, reach, asdict(method))


def _grid(points: int, levels: int) -> list[int]:
    return [(i + 1) * (levels // points) - 1 for i in range(points)]  # [19, 39, ..., 999] for 50 of 1000


def _lcm_scheduler(method: LCMConfig, model: Model) -> Any:
    from diffusers import LCMScheduler

    config = model.pipeline().scheduler.config
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    fields = {key: config[key] for key in (*keep, "rescale_betas_zero_snr") if config.get(key) is not None}
    try:
        scheduler = LCMScheduler(
            **fields, original_inference_steps=method.num_ddim_timesteps, timestep_scaling=method.timestep_scaling
        )
    except NotImplementedError as error:
        raise InputError(
            f"expected a beta_schedule that LCMScheduler knows, got {config.get('beta_schedule')!r}; give `trained_betas` "
            "in the teacher's scheduler config instead"
        ) from error
    knots = (torch.arange(len(scheduler.alphas_cumprod), dtype=torch.float64) + 1.0) / len(scheduler.alphas_cumprod)
    trained = model.denoiser.schedule.alpha(knots) ** 2
    if not torch.allclose(scheduler.alphas_cumprod.double(), trained, rtol=1e-4, atol=1e-7):
        raise InputError(
            "expected LCMScheduler to have the noise table of the training, got another; fix the teacher's scheduler"
        )
    return scheduler
