"""Guidance distillation (arXiv 2210.03142, stage one): the student says in one evaluation what guidance makes of two.

A full student is told the guidance w through an input of its own and learns a whole range at once; an adapter, or a network
without such an input, learns one w. What comes out samples as many steps as its teacher, at half the cost each, and is the
teacher that :mod:`.progressive` begins with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batch import Batch
from ..diffusion.losses import Weighting, mse, x0_weight
from ..diffusion.prediction import determines
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.timesteps import trainable, uniform
from ..errors import InputError
from ..method import Losses, Method
from ..networks.denoiser import Denoiser
from ..networks.network import Network


@dataclass
class GuidanceDistillConfig:
    """Guidance distillation.

    Attributes:
        w_min: smallest guidance w drawn in training (Diffusers' guidance_scale is w + 1).
        w_max: largest guidance w; equal to w_min for a student that is not told it, such as a LoRA.
        weighting: of the x0 error by its SNR: truncated_snr, snr+1, or snr. By default truncated_snr, as in the paper, and
            snr for an eps student, whose plain error that is.
    """

    w_min: float = 6.5
    w_max: float = 6.5
    weighting: Weighting | None = None

    def __post_init__(self) -> None:
        check_range(self.w_min, self.w_max)


def check_range(w_min: float, w_max: float) -> None:
    """InputError unless 0 <= w_min <= w_max."""
    if not 0.0 <= w_min <= w_max < float("inf"):
        raise InputError(f"expected 0 <= w_min <= w_max, got {w_min} and {w_max}; fix --method.w_min, --method.w_max")


def check_told(student: Denoiser, w_min: float, w_max: float) -> None:
    """InputError for a range of w that the student is not told: it would learn the average over the range."""
    if w_min < w_max and not student.takes_guidance:
        raise InputError(
            f"expected one w for a student without a guidance input, got {w_min} to {w_max}; set --method.w_min and "
            "--method.w_max to the same, or use --student.kind full on a network that has one (UNets with time_cond_proj_dim)"
        )


def check_kind(denoiser: Denoiser, schedule: NoiseSchedule) -> None:
    """InputError for a network whose output says nothing on x0 at pure noise: eps with zero terminal SNR, or on a flow."""
    if not bool(determines(denoiser.predicts, schedule, torch.ones(1, dtype=torch.float64)).all()):
        raise InputError(
            f"expected v, x0 or flow prediction where alpha is 0 at the first step (zero terminal SNR, flow), got "
            f"{denoiser.predicts}: x0 is 0/0 there; give --teacher.path a checkpoint of another prediction_type, or one "
            "without rescale_betas_zero_snr"
        )


def weighting_of(weighting: Weighting | None, student: Denoiser, schedule: NoiseSchedule) -> Weighting:
    """The weighting, or the default for the student's kind; InputError for one that is 0 at pure noise."""
    chosen: Weighting = weighting or ("snr" if student.predicts == "eps" else "truncated_snr")
    if not bool(x0_weight(chosen, schedule.snr(torch.ones(1, dtype=torch.float64))).all()):
        raise InputError(
            f"expected a weight above 0 at every time, got {chosen} with zero terminal SNR, where sampling begins; use "
            "--method.weighting truncated_snr or snr+1"
        )
    return chosen


class GuidanceDistill(Method):
    """Distils `teacher` with classifier-free guidance into one evaluation of `student`.

    Args:
        config: the guidance, and the weighting.
        student: a full network with a guidance input, or any student for one fixed w.
        teacher: the frozen denoiser, which knows conditions and "no prompt".

    Raises:
        InputError: a range of w for a student that is not told it; eps prediction with zero terminal SNR.
    """

    def __init__(self, config: GuidanceDistillConfig, student: Denoiser, teacher: Denoiser) -> None:
        self.config, self.student, self.teacher, self.schedule = config, student, teacher, teacher.schedule
        check_told(student, config.w_min, config.w_max)
        for network in (teacher, student):
            check_kind(network, self.schedule)
        self.weighting = weighting_of(config.weighting, student, self.schedule)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        """Section 3.1 of arXiv 2210.03142."""
        x0, cond, rng = batch.data(), batch.cond, batch.rng
        if not batch.uncond:
            raise InputError(
                "expected a model that also knows no prompt, which guidance needs, got an unconditional one; leave the "
                "guidance distillation out"
            )
        t = trainable(uniform(rng.uniform("time")), self.schedule)
        w = uniform(rng.uniform("guidance"), self.config.w_min, self.config.w_max)
        x_t = self.schedule.add_noise(x0, rng.normal("noise", x0.shape[1:], x0.dtype), t)
        with torch.no_grad():
            wanted = self.teacher.guide(x_t, t, cond, batch.uncond, w).x0  # (1 + w) x0_c - w x0
        error = mse(self.student(x_t, t, self.student.tell(cond, w)).x0, wanted)
        weight = x0_weight(self.weighting, self.schedule.snr(t))
        return Losses({"distillation": (weight.to(error) * error).mean()}, count=len(batch))
