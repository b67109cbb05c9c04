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
        trained: what the method was configured with.
    """

    method: str
    scheduler: Any
    steps: tuple[int, ...]
    default_steps: int
    timesteps: dict[str, list[int]]
    guidance_scale: float
    trained: dict[str, Any]


def sampling(method: LCMConfig, model: Model) -> Sampling:
    """The sampling of a student trained by `method` from `model`."""
    return lcm_sampling(method, model)


def lcm_sampling(method: LCMConfig, model: Model) -> Sampling:
    """LCMScheduler on the grid of the training (arXiv 2310.04378), without guidance, which the student has learned.

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
    return Sampling("lcm", scheduler, steps, min(4, steps[-1]), timesteps, 1.0, asdict(method))


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
