"""How an adversarially distilled student is sampled: an x0 at each of its times, and fresh noise on it to the next.

That is multistep consistency sampling without boundary scalings: LCMScheduler with scalings that are exactly 0 and 1, and on a
flow FlowMatchLCMScheduler, which has none.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ..diffusion.schedule import Flow, Tabulated
from ..errors import InputError
from ..families import Model
from ..methods.adversarial import StudentTimes
from ..methods.ladd import LADDConfig
from .sampling import Sampling, table_fields, told

SCALING = 1e10  # LCMScheduler's timestep_scaling: c_skip is below float32's resolution from index 1 on, and c_out is 1
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # that LCMScheduler reads


def ladd_sampling(method: LADDConfig, model: Model) -> Sampling:
    """The stock scheduler that visits the student's times (arXiv 2403.12015), without classifier-free guidance.

    A student that is told its guidance, as Flux is, was told the family's usual scale throughout.

    At fewer steps than there are times it visits as many of them, evenly chosen from the first on. A first time below 1 on a
    noise table is the end of a shorter table, where sampling begins with pure noise as the training did.

    Raises InputError where no stock scheduler visits these times; call it before the training to know in time.
    """
    times = method.student_times()
    visited = _visited(times)
    schedule = model.denoiser.schedule
    timesteps: dict[str, list[int]] = {}
    sigmas: dict[str, list[float]] = {}
    if isinstance(schedule, Tabulated):
        scheduler = _on_a_table(times, schedule, model)
        for steps, where in visited.items():
            scheduler.set_timesteps(steps)
            timesteps[str(steps)] = [int(t) for t in scheduler.timesteps]
            trained = [round(float(i)) for i in schedule.index(times.grid[where])]
            if timesteps[str(steps)] != trained:
                raise InputError(
                    f"expected evenly spaced times down to the last, as LCMScheduler steps, got {list(times.times)}: it would "
                    f"visit {timesteps[str(steps)]} at {steps} steps and not {trained}; fix --method.times"
                )
    elif isinstance(schedule, Flow):
        scheduler = _on_a_flow(model)
        for steps, where in visited.items():
            sigmas[str(steps)] = [float(s) for s in schedule.sigma(times.grid[where])]
    else:
        raise InputError(
            f"expected a noise table or a flow, got {type(schedule).__name__}; no stock scheduler samples it"
        )
    usual = model.usual_guidance
    scale, reach = told(usual - 1.0, usual - 1.0, model.denoiser.takes_guidance, usual)
    lists = {name: list(vars(times)[name]) for name in ("times", "probabilities", "warmup_probabilities")}
    return Sampling(
        method="ladd",
        title="LADD",
        kind="adversarially distilled",
        scheduler=scheduler,
        steps=tuple(visited),
        default_steps=max(visited),
        timesteps=timesteps,
        guidance_scale=scale,
        guidance_range=reach,
        trained={**asdict(method), **lists, "taps": None if method.taps is None else list(method.taps)},
        guidance_note="; the weights hold the guidance of the latents that they were trained on",
        sigmas=sigmas,
    )


def _visited(times: StudentTimes) -> dict[int, list[int]]:
    """Number of steps -> which of the times, for the divisors of their number whose times were all trained at."""
    count = len(times.times)
    steps = [n for n in range(1, count + 1) if count % n == 0]
    found = {n: [i * count // n for i in range(n)] for n in steps}
    found = {n: where for n, where in found.items() if all(times.probabilities[i] > 0 for i in where)}
    if not found:
        raise InputError(
            f"expected a first time that is trained at, where every sampling begins, got a probability of 0 for "
            f"{times.times[0]:g}; fix --method.probabilities"
        )
    return found


def _on_a_table(times: StudentTimes, schedule: Tabulated, model: Model) -> Any:
    from diffusers import LCMScheduler

    if model.denoiser.predicts not in PREDICTIONS:
        raise InputError(
            f"expected eps, v or x0 prediction on a noise table, which LCMScheduler reads, got {model.denoiser.predicts}; no "
            "stock scheduler samples it"
        )
    fields = table_fields(model)
    try:
        scheduler = LCMScheduler(**fields)
    except NotImplementedError as error:
        raise InputError(
            f"expected a beta_schedule that LCMScheduler knows, got {fields.get('beta_schedule')!r}; give `trained_betas` "
            "in the teacher's scheduler config instead"
        ) from error
    levels = round(float(schedule.index(times.grid[:1]))) + 1
    if levels < schedule.levels:  # a table that ends at the first time
        kept = {"num_train_timesteps": levels, "trained_betas": scheduler.betas[:levels].tolist()}
        fields = {**kept, "prediction_type": PREDICTIONS[model.denoiser.predicts]}
    scheduler = LCMScheduler(**fields, original_inference_steps=len(times.times), timestep_scaling=SCALING)
    trained = schedule.alpha(schedule.time(torch.arange(levels))) ** 2
    if not torch.allclose(scheduler.alphas_cumprod.double(), trained, rtol=1e-4, atol=1e-7):
        raise InputError(
            "expected LCMScheduler to have the noise table of the training, got another; fix the teacher's scheduler"
        )
    return scheduler


def _on_a_flow(model: Model) -> Any:
    from diffusers import FlowMatchLCMScheduler

    levels = model.pipeline().scheduler.config.get("num_train_timesteps", 1000)
    return FlowMatchLCMScheduler(num_train_timesteps=levels, shift=1.0, use_dynamic_shifting=False)
