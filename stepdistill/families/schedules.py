"""From a Diffusers scheduler config to our NoiseSchedule and prediction kind: the checkpoint says how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..diffusion.prediction import Kind
from ..diffusion.schedule import Flow, NoiseSchedule, Tabulated
from ..errors import InputError

PREDICTION_TYPES: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
TABLE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def from_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule, Kind]:
    """(schedule, kind) of any Diffusers DDPM, DDIM, Euler, DPM, PNDM, LCM, ... or flow-matching scheduler config.

    The table itself is computed by Diffusers (DDPMScheduler), zero-terminal-SNR rescale (arXiv 2305.08891) included, so that
    it is the pipeline's to the last bit. Raises InputError for other schedulers (EDM), and for eps prediction with zero
    terminal SNR, where x0 is 0/0.
    """
    from diffusers import DDPMScheduler

    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        return Flow(), "flow"
    if "beta_schedule" not in config:  # EDM's and consistency models' schedulers; DDPM's table would be made up
        raise InputError(
            f"expected a scheduler with a table of betas or a flow-matching one, got {config.get('_class_name')}; "
            "this kind of teacher is not supported yet"
        )
    name = config.get("prediction_type") or "epsilon"
    if name not in PREDICTION_TYPES:
        raise InputError(
            f"expected a scheduler with prediction_type in {sorted(PREDICTION_TYPES)}, got {name!r}; "
            "fix scheduler/scheduler_config.json of the teacher"
        )
    kind = PREDICTION_TYPES[name]
    table = {key: config[key] for key in TABLE_KEYS if config.get(key) is not None}
    schedule = Tabulated(DDPMScheduler(**table).alphas_cumprod)
    if kind == "eps" and schedule.zero_terminal_snr:
        raise InputError(
            "expected v or sample prediction with zero terminal SNR (rescale_betas_zero_snr), got epsilon: x0 is 0/0 at the "
            "last timestep; set prediction_type to what the teacher was trained with, or rescale_betas_zero_snr to false"
        )
    return schedule, kind
