"""Progressive distillation (arXiv 2202.00512): a student learns to do in one step what its teacher does in k, rung by rung.

At the end of a rung the student is the teacher of the next, with fewer steps. Solver, target and sampler share one rule: a
rung of N steps visits N + 1 evenly spaced times from t = 1 to clean data at t = 0. The stock DDIMScheduler visits the same
with `timestep_spacing="trailing"`, `set_alpha_to_one=True` and no clipping, as long as N divides the table; on a flow the
stock Euler scheduler does with shift 1 and these times as its sigmas.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Cond
from ..config import CommaList
from ..diffusion.losses import Weighting, mse, x0_weight
from ..diffusion.prediction import Prediction
from ..diffusion.schedule import NoiseSchedule, Tabulated
from ..diffusion.solver import ddim, x0_of_step
from ..diffusion.timesteps import shift, uniform
from ..errors import InputError
from ..method import Losses, Method
from ..networks.denoiser import Denoiser
from ..networks.network import Network
from .guidance_distill import GuidanceDistillConfig, check_kind, check_range, check_told, weighting_of

START, FINAL = 8, 1
EPS_STEPS = 8  # the fewest that an eps student is good for


@dataclass
class ProgressiveConfig:
    """Progressive distillation.

    Attributes:
        teacher_steps: DDIM steps of the first teacher.
        start_steps: steps of the first student, 8 by default; each rung has half the steps of the one before.
        final_steps: steps of the last student, 1 by default.
        rungs: instead of these two, the steps of each student, comma separated, e.g. 8,4,2,1.
        w_min: smallest guidance w of the teacher (Diffusers' guidance_scale is w + 1).
        w_max: largest guidance w; equal to w_min for a student that is not told it, such as a LoRA.
        weighting: of the x0 error by its SNR: truncated_snr, snr+1, or snr. By default truncated_snr, as in the paper, and
            snr for an eps student, whose plain error that is.
        shift: timestep shift of the grids of a flow-matching model, e.g. 3 as Stable Diffusion 3 is sampled.
    """

    teacher_steps: int = 40
    start_steps: int | None = None
    final_steps: int | None = None
    rungs: CommaList | None = None
    w_min: float = 6.5
    w_max: float = 6.5
    weighting: Weighting | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.w_min, self.w_max)
        if not self.shift > 0:
            raise InputError(f"expected shift > 0, got {self.shift}; fix --method.shift (1 means none)")
        for before, after in pairwise((self.teacher_steps, *self.ladder())):
            if after < 1 or before % after or before <= after:
                raise InputError(
                    f"expected each student to make one step of two or more whole steps of its teacher, got {after} steps "
                    f"after {before}; fix --method.teacher_steps, --method.start_steps or --method.rungs (40, then 8,4,2,1)"
                )

    def ladder(self) -> tuple[int, ...]:
        """The steps of each student, first to last. InputError for impossible ones."""
        if self.rungs is not None:
            if self.start_steps is not None or self.final_steps is not None:
                raise InputError("expected --method.rungs or --method.start_steps and --method.final_steps, got both")
            try:
                steps = self.rungs.ints()
            except InputError as error:
                raise InputError(f"{error}; fix --method.rungs") from error
            if not steps:
                raise InputError("expected at least one rung, got none; fix --method.rungs (8,4,2,1 is usual)")
            return steps
        start = START if self.start_steps is None else self.start_steps
        final = min(FINAL, start) if self.final_steps is None else self.final_steps
        steps = (start,)
        while steps[-1] > final >= 1 and steps[-1] % 2 == 0:
            steps = (*steps, steps[-1] // 2)
        if steps[-1] != final or final < 1:
            raise InputError(
                f"expected start_steps to be final_steps times 2, 4, 8, ..., got {start} and {final}; fix "
                "--method.start_steps, --method.final_steps, or name the steps with --method.rungs"
            )
        return steps

    def guidance(self) -> GuidanceDistillConfig:
        """The options of a guidance distillation before the ladder, whose student is its first teacher."""
        return GuidanceDistillConfig(self.w_min, self.w_max, self.weighting)

    def grid(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """[steps + 1] times from 1 to 0 that a network of so many steps is trained and sampled at, float64."""
        return shift(schedule.grid(steps), self.shift)

    def check(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        """What can be known before data are prepared: InputError for networks that this ladder is not for.

        Rungs that the stock sampler would not follow, a range of w for a student that is not told it, eps prediction at few
        steps or with zero terminal SNR, a weight of 0 at pure noise.
        """
        check_told(student, self.w_min, self.w_max)
        for network in (student, *([] if teacher is None else [teacher])):
            check_kind(network, student.schedule)
        _check_few_steps(student, self.ladder()[-1])
        _check_grid(self, student.schedule)
        weighting_of(self.weighting, student, student.schedule)


class Progressive(Method):
    """The ladder. Its rounds are the rungs: `steps` is the number of steps that the student of this round makes.

    Args:
        config: the rungs, and the teacher's guidance.
        student: what trains, a LoRA or a full network. Where it has an input for guidance it is told w.
        teacher: of the first rung, which stays as it is; classifier-free guidance is applied to it, unless it has an input for
            w or the data no "no prompt". None: the student as it is now, which has its guidance in it already.

    From the second rung on the teacher is a frozen copy of the student: of its weights, or of its adapter beside it on one
    base. It is a role, so that a checkpoint has it; a teacher that was given is let go of then.

    Raises InputError as :meth:`ProgressiveConfig.check` does.
    """

    def __init__(self, config: ProgressiveConfig, student: Denoiser, teacher: Denoiser | None = None) -> None:
        self.config, self.student, self.schedule = config, student, student.schedule
        self.ladder = (config.teacher_steps, *config.ladder())
        self.rung = 0
        config.check(student, teacher)
        self.weighting = weighting_of(config.weighting, student, self.schedule)
        self.copied = teacher is None  # whether the teacher is a copy of the student, whose guidance is in it
        self.teacher = student.frozen_copy() if teacher is None else teacher

    @property
    def steps(self) -> int:
        """Of this round's student."""
        return self.ladder[self.rung + 1]

    @property
    def grid(self) -> Tensor:
        """[steps + 1] times of this round's student."""
        return self.config.grid(self.schedule, self.steps)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, **({"teacher": self.teacher} if self.copied else {})}

    def coming(self) -> tuple[Network, ...]:
        return () if self.copied or self.rung + 2 == len(self.ladder) else (self.student,)

    def training_step(self, batch: Batch) -> Losses:
        """Algorithm 2 of arXiv 2202.00512; with guidance, section 3.2 of arXiv 2210.03142."""
        x0, rng = batch.data(), batch.rng
        i = rng.integers("time", 0, self.steps)
        w = uniform(rng.uniform("guidance"), self.config.w_min, self.config.w_max)
        t = self.grid[i]
        x_t = self.schedule.add_noise(x0, rng.normal("noise", x0.shape[1:], x0.dtype), t)
        with torch.no_grad():
            wanted = self.wanted(x_t, i, batch.cond, batch.uncond, w)
        error = mse(self.student(x_t, t, self.student.tell(batch.cond, w)).x0, wanted)
        loss = x0_weight(self.weighting, self.schedule.snr(t)).to(error) * error  # eq. 9 by default
        return Losses({"distillation": loss.mean()}, {"rung": loss.new_tensor(float(self.steps))}, count=len(batch))

    def wanted(self, x_t: Tensor, i: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Tensor:
        """The x0 with which the student's step from x_t lands where k steps of the teacher do, [B, ...].

        Not the x0 that the teacher's last step says. i [B] are the student's steps, 0 the first.
        """
        k = self.ladder[self.rung] // self.steps
        times = self.config.grid(self.schedule, self.ladder[self.rung])[k * i[:, None] + torch.arange(k + 1)]
        x = x_t
        for j in range(k):
            x = ddim(self.schedule, self._taught(x, times[:, j], cond, uncond, w), times[:, j + 1])
        return x0_of_step(self.schedule, x_t, times[:, 0], x, times[:, k])

    def _taught(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Prediction:
        """The teacher's prediction with its guidance."""
        if self.copied or self.teacher.takes_guidance or self.config.w_max == 0:
            return self.teacher(x_t, t, self.teacher.tell(cond, w))
        return self.teacher.guide(x_t, t, cond, uncond, w)

    def next_round(self) -> bool:
        """The student becomes the teacher of the next rung, and starts from itself."""
        if self.rung + 2 == len(self.ladder):
            return False
        self.rung += 1
        if self.copied:
            weights = self.student.state()
            with torch.no_grad():
                for name, value in self.teacher.state().items():
                    value.copy_(weights[name])
        else:
            self._copy_student()
        return True

    def _copy_student(self) -> None:
        self.copied, self.teacher = True, self.student.frozen_copy()

    def state_dict(self) -> dict[str, Any]:
        return {"ladder": list(self.ladder), "rung": self.rung}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if tuple(state["ladder"]) != self.ladder:
            raise InputError(
                f"expected the steps {', '.join(map(str, state['ladder']))} of this checkpoint, got "
                f"{', '.join(map(str, self.ladder))}; set --method.teacher_steps and the rungs back, or start anew with "
                "another --output_dir"
            )
        self.rung = state["rung"]
        if self.rung > 0 and not self.copied:
            self._copy_student()  # of weights that the checkpoint will replace


def _check_few_steps(student: Denoiser, fewest: int) -> None:
    if student.predicts == "eps" and fewest < EPS_STEPS:
        raise InputError(
            f"expected at least {EPS_STEPS} steps of an eps student, got {fewest}: in its first step an error of eps is one of "
            "x0 sigma / alpha times as large, 15 on Stable Diffusion's table; end the ladder with --method.final_steps "
            f"{EPS_STEPS}, or distil a model of v, x0 or flow prediction (--teacher.path)"
        )


def _check_grid(config: ProgressiveConfig, schedule: NoiseSchedule) -> None:
    """A table's sampler steps by whole levels: a number of steps that does not divide them leaves the times trained at."""
    if not isinstance(schedule, Tabulated):
        return
    if config.shift != 1.0:
        raise InputError(
            f"expected no shift on a discrete noise table, got {config.shift}: DDIMScheduler has none; drop --method.shift"
        )
    levels, steps = schedule.levels, config.teacher_steps  # which the rungs divide
    if levels % steps:
        fitting = ", ".join(str(n) for n in range(1, min(levels, 51)) if levels % n == 0)
        raise InputError(
            f"expected teacher_steps that divide the teacher's {levels} levels, got {steps}: DDIMScheduler steps by "
            f"{levels} // {steps} = {levels // steps} and would leave the times trained at; choose teacher and rungs among "
            f"{fitting} (--method.teacher_steps, --method.rungs)"
        )
