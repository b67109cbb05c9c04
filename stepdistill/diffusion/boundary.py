"""Boundary conditions of a consistency function: f = c_skip x + c_out x0_hat, with f(x, 0) = x."""

from __future__ import annotations

import torch
from torch import Tensor


def lcm_scalings(index: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of latent consistency models (arXiv 2310.04378, appendix; the constants of `LCMScheduler`).

        c_skip = sigma_data^2 / ((k n)^2 + sigma_data^2),    c_out = k n / sqrt((k n)^2 + sigma_data^2)

    c_out has no factor sigma_data, unlike consistency models and EDM. Trainer and sampler must share k.

    Args:
        index: [B] native timestep n (0 .. 999), float64. Clean data, at index -1 in our t, counts as 0: f(x, 0) = x.
        timestep_scaling: k.
    """
    scaled = timestep_scaling * index.double().clamp(min=0.0)
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / torch.sqrt(scaled**2 + sigma_data**2)
    return c_skip, c_out
