"""The global batch of a step: this process's share of it in micro-batches, and its samples by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..batch import Batch
from ..data.order import DataSet, indices
from ..errors import InputError
from ..randomness import StepRandom
from .config import TrainConfig

NAMED = 8  # samples in a message


class Batches:
    """A run's batches. Micro-batches are numbered through the global batch, those of process 0 first."""

    def __init__(self, config: TrainConfig, data: DataSet, accelerator: Any) -> None:
        if len(data) < 1:
            raise InputError("expected a data set with at least one sample, got none")
        self.data, self.seed, self.device = data, config.seed, accelerator.device
        self.size, self.parts = config.train_batch_size, config.gradient_accumulation_steps
        self.process, self.processes = int(accelerator.process_index), int(accelerator.num_processes)

    def _positions(self, number: int) -> range:
        return range(number * self.size, (number + 1) * self.size)

    def _samples(self, step: int, positions: Sequence[int]) -> list[int]:
        return indices(self.seed, step, positions, self.size * self.parts * self.processes, len(self.data))

    def of(self, step: int) -> list[Batch]:
        """This process's micro-batches of `step`, on its device."""
        batches = []
        for i in range(self.parts):
            positions = self._positions(self.process * self.parts + i)
            rng = StepRandom(self.seed, step, positions)
            batches.append(self.data.batch(self._samples(step, positions), rng).to(self.device))
        return batches

    def named(self, step: int, numbers: Sequence[int] = ()) -> str:
        """The data set's indices of the samples in these micro-batches of `step`, or in all: a few, for a message."""
        chosen = numbers or range(self.parts * self.processes)
        samples = self._samples(step, [p for number in chosen for p in self._positions(number)])
        shown = ", ".join(str(sample) for sample in samples[:NAMED]) + (", ..." if len(samples) > NAMED else "")
        owners = sorted({number // self.parts for number in numbers}) if self.processes > 1 else []
        return f"samples {shown}" + (f" (process {', '.join(map(str, owners))})" if owners else "")
