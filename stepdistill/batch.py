"""What a method is given for one micro-batch: tensors, conditions, and the randomness that belongs to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .randomness import StepRandom

Cond = dict[str, Tensor]
"""Everything a denoiser is conditioned on, [B, ...] each, cacheable. The keys `guidance` (the scale that a network with a
guidance embedding takes) and `until` (a target time) are reserved, [B] each."""


def move(cond: Cond, device: torch.device | str) -> Cond:
    """The same conditions on `device`."""
    return {name: value.to(device, non_blocking=True) for name, value in cond.items()}


def concat(*conds: Cond) -> Cond:
    """Conditions stacked along the batch, for one forward instead of several; all must have the same keys."""
    first = conds[0]
    if any(c.keys() != first.keys() for c in conds):
        raise ValueError(f"expected the same condition keys everywhere, got {[sorted(c) for c in conds]}")
    return {name: torch.cat([c[name] for c in conds]) for name in first}


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        x0: [B, C, H, W] scaled latents (or pixels in [-1, 1]); None for methods that need no data.
        cond: what the denoiser is conditioned on.
        uncond: the same with the family's own "no prompt"; {} for unconditional models.
        rng: this micro-batch's randomness.
        extra: further tensors a data set carries (labels, token ids), [B, ...] each.
        memo: scratch space shared by the phases of one step (a fake sample computed once), cleared after the step.
    """

    x0: Tensor | None
    cond: Cond
    uncond: Cond
    rng: StepRandom
    extra: dict[str, Tensor] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rng)

    def data(self) -> Tensor:
        """x0, or a clear error where the data set has none."""
        if self.x0 is None:
            raise ValueError("this method needs data (Batch.x0), got a data set without images; give --data.path")
        return self.x0

    def to(self, device: torch.device | str) -> Batch:
        """Everything on `device`."""
        x0 = None if self.x0 is None else self.x0.to(device, non_blocking=True)
        return Batch(
            x0,
            move(self.cond, device),
            move(self.uncond, device),
            self.rng.to(device),
            move(self.extra, device),
            self.memo,
        )
