"""Losses and weights, each as it stands in its paper. All return one value a sample, [B]."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Weighting = Literal["truncated_snr", "snr+1", "snr"]
"""A weight of the x0 error, by its name in arXiv 2202.00512, section 4."""

GanLoss = Literal["hinge", "non_saturating"]
"""What discriminator and generator minimise: the hinge (arXiv 1705.02894), or the non-saturating loss (arXiv 1406.2661)."""


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


def discriminator_loss(kind: GanLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises, of its logits (above 0 says "real") on both; [B, ...] each -> [B].

        hinge           max(0, 1 - real) + max(0, 1 + fake)
        non_saturating  softplus(-real) + softplus(fake)

    Each logit has a loss of its own; they are averaged after that, so that one certain token does not speak for the others.
    """
    real, fake = real.flatten(1), fake.flatten(1)
    if kind == "hinge":
        return functional.relu(1.0 - real).mean(1) + functional.relu(1.0 + fake).mean(1)
    if kind == "non_saturating":
        return functional.softplus(-real).mean(1) + functional.softplus(fake).mean(1)
    raise ValueError(f"expected a GAN loss in {get_args(GanLoss)}, got {kind!r}")


def generator_loss(kind: GanLoss, fake: Tensor) -> Tensor:
    """What the generator minimises, of the logits on its samples: -fake, or softplus(-fake); [B, ...] -> [B]."""
    if kind == "hinge":
        return -fake.flatten(1).mean(1)
    if kind == "non_saturating":
        return functional.softplus(-fake).flatten(1).mean(1)
    raise ValueError(f"expected a GAN loss in {get_args(GanLoss)}, got {kind!r}")


def r1(logits: Tensor, inputs: Tensor) -> Tensor:
    """|d D / d inputs|^2 of each sample (R1, arXiv 1801.04406, eq. 9), [B]; gamma / 2 times its mean is added to a loss.

    With several logits a sample it is that of their sum over their number: the mean of what each would give where no two read
    the same inputs. Keeps a graph, for the discriminator to learn from. Autocast is off in it, which also acts on derivatives.

    Args:
        logits: [B, ...], with a graph to `inputs`.
        inputs: [B, ...] that require grad; no sample's logits depend on another's.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.square().flatten(1).sum(1) / logits[0].numel()


def approximate_r1(logits: Tensor, perturbed: Tensor) -> Tensor:
    """|D(x) - D(x + sigma n)|^2 (arXiv 2501.08316, section 3.3) of the logits on both, [B, ...] each -> [B].

    It estimates sigma^2 times :func:`r1`, without a second derivative. n ~ N(0, I) is added to what the network is given, and
    nothing else may differ between the two; at sigma = 0 it is exactly 0.
    """
    return (logits - perturbed).square().flatten(1).mean(1)
