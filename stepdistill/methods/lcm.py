"""Latent consistency distillation (arXiv 2310.04378), as LCM-LoRA trains it (arXiv 2311.05556).

The student learns to jump from any point of the teacher's guided ODE to its end, by agreeing with itself one teacher step
further on. With a LoRA student the target is the same network without gradient, adapters ON, or an average of its adapter;
the teacher is adapters OFF. A full student agrees with a slow average of itself, and is told which guidance w to jump with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch, Cond
from ..diffusion.boundary import lcm_scalings
from ..diffusion.losses import mse, pseudo_huber
from ..diffusion.prediction import Prediction
from ..diffusion.schedule import NoiseSchedule, Tabulated, expand
from ..diffusion.solver import ddim
from ..diffusion.timesteps import shift, uniform
from ..errors import InputError
from ..method import Losses, Method
from ..networks.denoiser import Denoiser
from ..networks.network import Network

DECAY = 0.95  # mu of a full student's average


@dataclass
class LCMConfig:
    """Latent consistency distillation.

    Attributes:
        w_min: smallest guidance w drawn in training (Diffusers' guidance_scale is w + 1).
        w_max: largest guidance w.
        num_ddim_timesteps: points of the teacher's solver grid (the scheduler's original_inference_steps).
        loss_type: huber or l2.
        huber_c: constant of the pseudo-Huber loss.
        timestep_scaling: k of c_skip and c_out; LCMScheduler must use the same.
        sigma_data: of c_skip and c_out.
        target_decay: of the average of the student that it is trained towards; 0 is the student itself. By default 0.95
            for a full student, as in the paper, and 0 for a LoRA, as in LCM-LoRA.
        shift: timestep shift of the grid of a flow-matching model, e.g. 3 as Stable Diffusion 3 is sampled.
    """

    w_min: float = 5.0
    w_max: float = 15.0
    num_ddim_timesteps: int = 50
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: float = 0.001
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    target_decay: float | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.w_min <= self.w_max:
            raise InputError(
                f"expected 0 <= w_min <= w_max, got {self.w_min} and {self.w_max}; fix --method.w_min, --method.w_max"
            )
        if self.num_ddim_timesteps < 2:
            raise InputError(f"expected num_ddim_timesteps >= 2, got {self.num_ddim_timesteps}; 50 is usual")
        if not self.huber_c > 0:
            raise InputError(f"expected huber_c > 0, got {self.huber_c}; 0.001 is usual")
        if self.target_decay is not None and not 0.0 <= self.target_decay < 1.0:
            raise InputError(f"expected target_decay in [0, 1), got {self.target_decay}; fix --method.target_decay")
        if not self.shift > 0:
            raise InputError(f"expected shift > 0, got {self.shift}; fix --method.shift (1 means none)")

    def grid(self, schedule: NoiseSchedule) -> Tensor:
        """[num_ddim_timesteps + 1] times of the teacher's solver, from 1 to 0, float64."""
        return shift(schedule.grid(self.num_ddim_timesteps), self.shift)


class LCM(Method):
    """Consistency distillation of `teacher` into `student`, on any schedule and prediction kind.

    Args:
        config: the paper's constants.
        student: the consistency function to train, a LoRA or a full network; on a :class:`Tabulated` schedule with c_skip
            and c_out, as LCMScheduler samples it, on other schedules (flow) its x0 itself.
        teacher: the frozen denoiser.
    """

    def __init__(self, config: LCMConfig, student: Denoiser, teacher: Denoiser) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        default = DECAY if student.adapters is None else 0.0
        self.decay = default if config.target_decay is None else config.target_decay
        self.target = student.frozen_copy() if self.decay > 0 else student  # theta^-
        self.schedule = teacher.schedule
        self.grid = config.grid(self.schedule)  # t_N = 1 > ... > t_0 = 0
        if isinstance(self.schedule, Tabulated):
            levels = self.schedule.levels
            if config.shift != 1.0:
                raise InputError(
                    f"expected no shift on a discrete noise table, got {config.shift}: LCMScheduler has none; drop "
                    "--method.shift"
                )
            if levels % config.num_ddim_timesteps:
                raise InputError(
                    f"expected num_ddim_timesteps to divide the teacher's {levels} levels, got {config.num_ddim_timesteps}; "
                    "LCMScheduler would sample other times than were trained; use 50, 40 or 25"
                )
            self.grid[-1] = 1.0 / levels  # the discrete grid ends at index 0, abar[0], as LCM's does: [999, ..., 19, 0]

    def networks(self) -> dict[str, Network]:
        return (
            {"student": self.student}
            if self.target is self.student
            else {"student": self.student, "target": self.target}
        )

    def training_step(self, batch: Batch) -> Losses:
        """Algorithm 1 of arXiv 2310.04378, with the skipping step of section 4.3."""
        x0, cond, rng = batch.data(), batch.cond, batch.rng
        k = rng.integers("time", 0, len(self.grid) - 1)
        t, s = self.grid[k], self.grid[k + 1]  # t_{n+k} and t_n, one solver step apart
        w = uniform(rng.uniform("guidance"), self.config.w_min, self.config.w_max)
        x_t = self.schedule.add_noise(x0, rng.normal("noise", x0.shape[1:], x0.dtype), t)
        told = self.student.tell(cond, w)

        jump = self.consistency(x_t, t, self.student(x_t, t, told))
        with torch.no_grad():
            x_s = ddim(self.schedule, self.guided(x_t, t, cond, batch.uncond, w), s)  # section 4.2: Psi with guidance w
            target = self.consistency(x_s, s, self.target(x_s, s, told))  # theta^-; of a LoRA: adapters ON, no gradient
        huber = self.config.loss_type == "huber"
        loss = pseudo_huber(jump, target, self.config.huber_c) if huber else mse(jump, target)
        return Losses({"consistency": loss.mean()}, count=len(batch))

    @torch.no_grad()
    def after_step(self) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta, the last line of Algorithm 1."""
        if self.target is self.student:
            return
        weights = self.student.named_trainable()
        whole = self.target.adapters is None
        average = dict(self.target.module.named_parameters()) if whole else self.target.state()
        torch._foreach_lerp_([average[name] for name in weights], list(weights.values()), 1.0 - self.decay)

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Prediction:
        """The teacher's prediction with guidance w [B] (section 4.2)."""
        return self.teacher.guide(x_t, t, cond, uncond, w)

    def consistency(self, x: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """f(x, t) = c_skip x + c_out x0_hat (section 4.1), which is x itself at the end of the grid."""
        if isinstance(self.schedule, Tabulated):
            index = self.schedule.index(t)
            c_skip, c_out = lcm_scalings(index, self.config.timestep_scaling, self.config.sigma_data)
        else:  # no sampler of flow models applies scalings, so none are trained; only the boundary is kept
            c_skip = (t == 0).double()
            c_out = 1.0 - c_skip
        return expand(c_skip, x) * x + expand(c_out, x) * prediction.x0
