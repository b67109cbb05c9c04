"""Distributions of training times, as maps from uniform (or normal) numbers, so that the caller owns the randomness."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import NoiseSchedule, Tabulated


def uniform(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """U[low, high) from u in [0, 1); [B] float64."""
    return low + (high - low) * u.double()


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(mean + std z) from z ~ N(0, 1) (arXiv 2403.03206, eq. 19); [B] float64."""
    return torch.sigmoid(mean + std * z.double())


def from_grid(u: Tensor, grid: Tensor) -> Tensor:
    """A uniformly chosen entry of `grid` [N] for each u in [0, 1); [B] float64."""
    index = (u.double() * len(grid)).long().clamp(max=len(grid) - 1)
    return grid.double()[index]


def choice(u: Tensor, probabilities: Tensor) -> Tensor:
    """For each u in [0, 1) an index, drawn with `probabilities` [N] (of any sum); [B] int64, never one of probability 0."""
    edges = probabilities.double().cumsum(0)
    index = torch.searchsorted(edges, u.double() * edges[-1], right=True)
    return index.clamp(max=int(probabilities.nonzero()[-1]))  # where u times the sum was rounded up to it


def trainable(t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """t in [0, 1) moved to times that a network trains at: a table's levels, each as likely; elsewhere at least 1e-5."""
    if isinstance(schedule, Tabulated):
        return (torch.floor(t * schedule.levels) + 1.0) / schedule.levels
    return t.clamp(min=1e-5)


def shift(t: Tensor, factor: float) -> Tensor:
    """Flow timestep shift  factor t / (1 + (factor - 1) t)  (arXiv 2403.03206, eq. 23); 1 leaves t as it is."""
    if factor <= 0:
        raise ValueError(f"expected a shift > 0, got {factor}; 1 means none")
    return factor * t / (1.0 + (factor - 1.0) * t)
