"""How a student is sampled: the stock scheduler that visits the times it was trained at, steps and guidance.

A file a method builds it, and a recipe hands it to the export: :mod:`.lcm`, :mod:`.progressive`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..diffusion.schedule import Tabulated
from ..errors import InputError
from ..families import Model

TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


@dataclass(frozen=True)
class Sampling:
    """The sampling side of a method.

    Attributes:
        method: its name in files and tags, e.g. "lcm".
        title: its name in a heading, e.g. "LCM".
        kind: an adjective for a sentence, e.g. "latent-consistency".
        scheduler: a stock Diffusers scheduler, ready to be saved.
        steps: step counts the student is meant for.
        default_steps: the one that examples use.
        timesteps: step count -> native timesteps that the scheduler visits; {} where sigmas say it, or the image's
            size decides.
        guidance_scale: what the pipeline is called with; 1.0 means no classifier-free guidance.
        guidance_range: what it may be called with, for a student that is told it; None for one that is not.
        trained: what the method was configured with.
        guidance_note: what the card says after the guidance scale of a student that is not told it.
        sigmas: step count -> noise levels, which the pipeline is called with; {} where the scheduler finds them by itself.
    """

    method: str
    title: str
    kind: str
    scheduler: Any
    steps: tuple[int, ...]
    default_steps: int
    timesteps: dict[str, list[int]]
    guidance_scale: float
    guidance_range: tuple[float, float] | None
    trained: dict[str, Any]
    guidance_note: str = ""
    sigmas: dict[str, list[float]] = field(default_factory=dict)


def told(w_min: float, w_max: float, takes_guidance: bool, usual: float) -> tuple[float, tuple[float, float] | None]:
    """(guidance_scale, guidance_range) of a student trained with w from w_min to w_max: 1.0 and None if it isn't told.

    Args:
        usual: the scale, where the range has it; else the nearest that it has.
    """
    if not takes_guidance:
        return 1.0, None
    reach = (w_min + 1.0, w_max + 1.0)
    return min(max(usual, reach[0]), reach[1]), reach


def levels(model: Model) -> int:
    """The num_train_timesteps of the teacher's scheduler, by which a network's times are counted."""
    return int(model.pipeline().scheduler.config.get("num_train_timesteps", 1000))


def table_fields(model: Model) -> dict[str, Any]:
    """What a scheduler has to know of a noise table, from the teacher's scheduler."""
    config = model.pipeline().scheduler.config
    return {key: config[key] for key in (*TABLE, "rescale_betas_zero_snr") if config.get(key) is not None}


def lcm_scheduler(fields: dict[str, Any], **options: Any) -> Any:
    """A stock LCMScheduler of a noise table; InputError for a table that it can't have."""
    from diffusers import LCMScheduler

    try:
        return LCMScheduler(**fields, **options)
    except NotImplementedError as error:
        raise InputError(
            f"expected a beta_schedule that LCMScheduler knows, got {fields.get('beta_schedule')!r}; give `trained_betas` "
            "in the teacher's scheduler config instead"
        ) from error


def flow_lcm_scheduler(model: Model) -> Any:
    """Its like on a flow, without a shift of its own: it would shift the sigmas that it is handed once more."""
    from diffusers import FlowMatchLCMScheduler

    return FlowMatchLCMScheduler(num_train_timesteps=levels(model), shift=1.0, use_dynamic_shifting=False)


def check_table(scheduler: Any, model: Model) -> None:
    """InputError unless a scheduler has the noise table of the training, or the beginning of it."""
    schedule, length = model.denoiser.schedule, len(scheduler.alphas_cumprod)
    total = schedule.levels if isinstance(schedule, Tabulated) else length
    trained = schedule.alpha((torch.arange(length, dtype=torch.float64) + 1.0) / total) ** 2
    if not torch.allclose(scheduler.alphas_cumprod.double(), trained, rtol=1e-4, atol=1e-7):
        raise InputError(
            f"expected {type(scheduler).__name__} to have the noise table of the training, got another; fix the teacher's "
            "scheduler"
        )
