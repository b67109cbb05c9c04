"""Stateless randomness: every draw is a function of (seed, step, stream, position in the global batch).

There is no generator state to save, so a resumed run draws what the uninterrupted one drew; and because a sample's numbers
depend on its place in the *global* batch, they do not change with micro-batching or the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SHARED = -1  # the position used for draws that all ranks and micro-batches must agree on


def key(*parts: int | str) -> tuple[int, int]:
    """A 128-bit key from integers and strings, stable over processes, platforms and Python versions."""
    digest = hashlib.blake2b("\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh counter-based generator (Philox, keyed with all 128 bits) for this combination of parts."""
    return np.random.Generator(np.random.Philox(key=np.array(key(*parts), dtype=np.uint64)))


def derived_seed(*parts: int | str) -> int:
    """A 63-bit integer seed for libraries that want one."""
    return key(*parts)[0] >> 1


class StepRandom:
    """The random numbers of one optimizer step, for the slice of the global batch that this process now works on.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        positions: each sample's index in the global batch of this step.
        device: where results go; they are drawn on the CPU, so they are the same everywhere.

    Two draws from one `stream` are equal; name streams after their use ("noise", "time", "guidance").
    """

    def __init__(
        self, seed: int, step: int, positions: Sequence[int], device: torch.device | str = "cpu", scope: str = ""
    ) -> None:
        # int(): a NumPy integer would otherwise make another key than the int of the same value
        self.seed, self.step, self.positions = int(seed), int(step), tuple(int(p) for p in positions)
        self.device, self._scope = torch.device(device), scope

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> StepRandom:
        """The same numbers, delivered on another device."""
        return StepRandom(self.seed, self.step, self.positions, device, self._scope)

    def scoped(self, name: str) -> StepRandom:
        """The same samples with streams of their own, e.g. for one phase or one part of a composite method."""
        return StepRandom(self.seed, self.step, self.positions, self.device, f"{self._scope}{name}/")

    def _generators(self, stream: str) -> list[np.random.Generator]:
        return [generator(self.seed, self.step, self._scope + stream, p) for p in self.positions]

    def normal(self, stream: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, 1) of shape [B, *shape], each sample from its own generator."""
        wide = np.float64 if dtype == torch.float64 else np.float32
        draws = [g.standard_normal(tuple(shape), dtype=wide) for g in self._generators(stream)]
        return torch.from_numpy(np.stack(draws)).to(dtype).to(self.device)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """U[0, 1) of shape [B, *shape], float64, **on the CPU**, where times and choices live."""
        return torch.from_numpy(np.stack([g.random(tuple(shape)) for g in self._generators(stream)]))

    def integers(self, stream: str, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Integers in [low, high), [B, *shape] int64, on the CPU."""
        draws = [g.integers(low, high, tuple(shape)) for g in self._generators(stream)]
        return torch.from_numpy(np.stack([np.asarray(d, dtype=np.int64) for d in draws]))

    def shared(self, stream: str) -> float:
        """One U[0, 1) number that is the same on every rank and in every micro-batch of this step."""
        return float(generator(self.seed, self.step, self._scope + stream, SHARED).random())

    def slice(self, start: int, stop: int) -> StepRandom:
        """The randomness of samples [start, stop) of this batch."""
        return StepRandom(self.seed, self.step, self.positions[start:stop], self.device, self._scope)
