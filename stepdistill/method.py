"""The contract between an objective and the loop. Read this first.

A :class:`Method` owns the maths of one paper and nothing else. It knows no optimizer, device, precision, logger or rank:
those belong to `training.Trainer`, which asks a method for its phases and, in each, for the loss of a micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .networks.network import Network


@dataclass
class Losses:
    """What a phase minimises on one micro-batch.

    Attributes:
        terms: named scalar means over the micro-batch; their sum is minimised.
        metrics: named scalars that are only logged.
        count: how many items the means were taken over (images, valid tokens). The trainer turns micro-batch means into
            the true mean over the global batch with it, so 1x8 == 2x4 also where items differ in number.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    count: Tensor | float = 1.0

    @property
    def total(self) -> Tensor:
        """The sum of the terms, a scalar with a graph."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class Phase:
    """One optimizer step of one or more roles.

    Attributes:
        trains: the roles (keys of :meth:`Method.networks`) that this phase updates; all others are frozen in it.
        loss: batch -> Losses.
        every: the phase runs on steps that are a multiple of this.
        rate: its learning rate as a factor on the run's.
    """

    trains: tuple[str, ...]
    loss: Callable[[Batch], Losses]
    every: int = 1
    rate: float = 1.0


class Method(ABC):
    """A distillation (or training) objective.

    A single-phase method writes `networks` and `training_step`. Adversarial methods return several :meth:`phases`;
    progressive ones halve their steps in :meth:`next_round`.
    """

    step: int = 0
    """The global step, set by the trainer before each step."""

    @abstractmethod
    def networks(self) -> dict[str, Network]:
        """Every role that trains or changes: student, critic, discriminator, target, projection. Not frozen teachers.

        Asked again after :meth:`next_round` and :meth:`load_state_dict`, which may add roles that do not train.
        """

    def training_step(self, batch: Batch) -> Losses:
        """The loss of the student on one micro-batch."""
        raise TypeError(f"{type(self).__name__} must write training_step() or phases()")

    def phases(self) -> tuple[Phase, ...]:
        """The optimizer steps made for each batch, in order."""
        return (Phase(("student",), self.training_step),)

    @property
    def needs_whole(self) -> str:
        """What whole weights are needed for within a step, as "to write text with"; "" where processes may share them out."""
        return ""

    def trained(self) -> set[str]:
        """The roles that phases train."""
        return {role for phase in self.phases() for role in phase.trains}

    def after_step(self) -> None:
        """Called once after all phases of a step: target EMA, curricula. Not after a step of which a phase was skipped."""

    def watch(self, means: Mapping[str, float]) -> str:
        """Looks at a step's means over the global batch, before :meth:`after_step`; what it returns is said as a warning.

        "" for nothing to say. Values of a phase that was skipped may be NaN.
        """
        return ""

    def next_round(self) -> bool:
        """Called at the end of each round; True if there is another (the optimizer is then made afresh).

        The student holds its average then, where there is one.
        """
        return False

    def coming(self) -> tuple[Network, ...]:
        """Networks of which :meth:`next_round` will add a copy to :meth:`networks`, so that checkpoints will be larger."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain scalars beyond the networks' weights; identical on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, before the networks get their weights back: it may have to make some of them."""
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state, got {sorted(state)}; is this another run's checkpoint?"
            )
