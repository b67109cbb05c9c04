"""The options that adversarial distillation in latents (:mod:`.ladd`) and in pixels (:mod:`.add`) share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from ..config import CommaList
from ..diffusion.losses import GanLoss
from ..errors import InputError
from .adversarial import StudentTimes, numbers


@dataclass
class AdversarialConfig:
    """What both games have.

    Attributes:
        times: of the student, which are also the times that it is sampled at, decreasing; a lower first time is for eps models.
        probabilities: of each of them.
        warmup_probabilities: the same while the student warms up.
        warmup_steps: optimizer steps of that.
        loss_type: hinge or non_saturating.
        taps: modules that get a head, comma separated.
        head_width: channels within a head.
        discriminator_rate: its learning rate as a factor on the student's.
        r1_gamma: R1, gamma / 2 of the squared gradient on the heads' inputs at real samples; 0 means none.
        r1_every: penalties on every so many steps, multiplied by that number.
        distillation: weight of the distance to what the teacher makes of the student's noised sample; 0 means none.
        w: guidance of the teacher in that term (Diffusers' guidance_scale is w + 1).
        guard_every: two samples of each prompt are compared every so many steps, to notice a collapse; 0 means never.
    """

    times: CommaList = CommaList(("1", "0.75", "0.5", "0.25"))  # noqa: RUF009  # immutable
    probabilities: CommaList = CommaList(("0.25", "0.25", "0.25", "0.25"))  # noqa: RUF009
    warmup_probabilities: CommaList = CommaList(("0.25", "0.25", "0.25", "0.25"))  # noqa: RUF009
    warmup_steps: int = 0
    loss_type: GanLoss = "hinge"
    taps: CommaList | None = None
    head_width: int = 64
    discriminator_rate: float = 1.0
    r1_gamma: float = 0.001
    r1_every: int = 1
    distillation: float = 0.0
    w: float = 0.0
    guard_every: int = 50

    def __post_init__(self) -> None:
        self.student_times()
        if self.loss_type not in get_args(GanLoss):
            raise InputError(
                f"expected loss_type in {get_args(GanLoss)}, got {self.loss_type!r}; fix --method.loss_type"
            )
        for name in ("head_width", "r1_every"):
            if (value := vars(self)[name]) < 1:
                raise InputError(f"expected {name} >= 1, got {value}; fix --method.{name}")
        self.not_negative("r1_gamma", "distillation", "w", "guard_every")
        if not self.discriminator_rate > 0:
            raise InputError(
                f"expected discriminator_rate > 0, got {self.discriminator_rate}; fix --method.discriminator_rate"
            )

    def not_negative(self, *names: str) -> None:
        """InputError where an option is below 0 or not finite."""
        for name in names:
            if not 0 <= (value := vars(self)[name]) < float("inf"):
                raise InputError(f"expected {name} >= 0, got {value}; fix --method.{name}")

    def student_times(self) -> StudentTimes:
        """The student's times with their probabilities. InputError for impossible ones."""
        return StudentTimes(
            numbers(self.times, "times"),
            numbers(self.probabilities, "probabilities"),
            numbers(self.warmup_probabilities, "warmup_probabilities"),
            self.warmup_steps,
        )

    def facts(self) -> dict[str, Any]:
        """All options as JSON has them, with numbers for the times."""
        times = self.student_times()
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, CommaList)}
        exact = {name: list(vars(times)[name]) for name in ("times", "probabilities", "warmup_probabilities")}
        return {**vars(self), **lists, **exact}
