"""Losses and weights, each as it stands in its paper. All return one value a sample, [B]."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Weighting = Literal["truncated_snr", "snr+1", "snr"]
"""A weight of the x0 error, by its name in arXiv 2202.00512, section 4."""


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over all axes but the first; [B, ...] -> [B]."""
    return (x - y).square().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float = 0.001) -> Tensor:
    """Elementwise sqrt(d^2 + c^2) - c, averaged; [B, ...] -> [B]. The form and constant of latent consistency models."""
    d = x - y
    return (torch.sqrt(d.square() + c**2) - c).flatten(1).mean(1)


def pseudo_huber_norm(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|d|_2^2 + c^2) - c on the norm over a whole sample (iCT, arXiv 2310.14189, eq. 8); [B, ...] -> [B].

    Args:
        c: defaults to 0.00054 sqrt(D), D = the number of elements of a sample.
    """
    d = (x - y).flatten(1)
    c = 0.00054 * math.sqrt(d.shape[1]) if c is None else c
    return torch.sqrt(d.square().sum(1) + c**2) - c


def truncated_snr(snr: Tensor) -> Tensor:
    """max(SNR, 1) (arXiv 2202.00512, eq. 9), weight of the x0 error; [B] -> [B]."""
    return snr.clamp(min=1.0)


def snr_plus_one(snr: Tensor) -> Tensor:
    """SNR + 1 (arXiv 2202.00512, section 4), the x0 weight equal to an unweighted v loss; [B] -> [B]."""
    return snr + 1.0


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (arXiv 2303.09556, eq. 3), weight of the x0 error; [B] -> [B]."""
    return snr.clamp(max=gamma)


def x0_weight(weighting: Weighting, snr: Tensor) -> Tensor:
    """The weight of the x0 error at this SNR; [B] -> [B]. "snr" makes it the plain error of eps."""
    if weighting == "truncated_snr":
        return truncated_snr(snr)
    if weighting == "snr+1":
        return snr_plus_one(snr)
    if weighting == "snr":
        return snr
    raise ValueError(f"expected a weighting in {get_args(Weighting)}, got {weighting!r}")
