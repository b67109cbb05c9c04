"""Which sample belongs at which place of which step: a pure function of (seed, step, position), so nothing is to be saved.

The epochs are laid end to end, each shuffled on its own, and a run reads that line of samples one global batch after the
other. Batches cross epoch boundaries, so every epoch shows each sample exactly once whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch
from ..randomness import StepRandom, generator


class DataSet(Protocol):
    """What the trainer draws its batches from."""

    def __len__(self) -> int:
        """The number of samples, the length of one epoch."""
        ...

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """Samples `indices` on the CPU; `rng` holds their places in the global batch, one for each index."""
        ...


@lru_cache(maxsize=2)  # a batch reaches from one epoch into the next
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    return generator(seed, "data order", epoch).permutation(length).astype(np.int64)


def order(seed: int, epoch: int, length: int) -> Tensor:
    """The samples of one epoch in the order in which they are seen: a permutation of 0 .. length - 1, [length] int64."""
    if length < 1:
        raise ValueError(f"expected a data set of at least one sample, got length {length}")
    return torch.from_numpy(_permutation(int(seed), int(epoch), int(length)).copy())


def indices(seed: int, step: int, positions: Sequence[int], global_batch: int, length: int) -> list[int]:
    """The samples at `positions` of the global batch of optimizer step `step`, both counted from 0.

    Sample g = step * global_batch + position of the run is sample g % length of epoch g // length.
    """
    if length < 1:
        raise ValueError(f"expected a data set of at least one sample, got length {length}")
    if step < 0 or any(not 0 <= p < global_batch for p in positions):
        raise ValueError(f"expected step >= 0 and positions in [0, {global_batch}), got step {step}, {list(positions)}")
    places = [divmod(int(step) * int(global_batch) + int(p), int(length)) for p in positions]
    return [int(_permutation(int(seed), epoch, int(length))[place]) for epoch, place in places]
