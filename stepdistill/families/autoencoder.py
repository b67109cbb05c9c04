"""The autoencoder of latent models, and the scale that their denoisers see its latents at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Autoencoder:
    """A frozen AutoencoderKL.

    The denoiser's latents are (z - centre) * scale of the autoencoder's z, with what the config says: scaling_factor with
    shift_factor, or where it has them latents_mean and latents_std of each channel.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.requires_grad_(False).eval()

    def _affine(self) -> tuple[Any, Any]:
        """(centre, scale), numbers or [1, C, 1, 1]."""
        config = self.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return config.shift_factor or 0.0, config.scaling_factor
        values = [torch.tensor(v, device=self.vae.device) for v in (config.latents_mean, config.latents_std)]
        mean, std = (value.reshape(1, -1, 1, 1) for value in values)
        return mean, config.scaling_factor / std

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the scaled latents of pixels [B, 3, H, W] in [-1, 1]; each [B, C, h, w] float32."""
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        centre, scale = self._affine()
        return (distribution.mean.float() - centre) * scale, distribution.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in about [-1, 1] of scaled latents [B, C, h, w]; differentiable."""
        centre, scale = self._affine()
        return self.vae.decode(latents.to(self.vae.dtype) / scale + centre, return_dict=False)[0]

    def checkpoint_activations(self) -> None:
        """Trades compute for memory: what a gradient through :meth:`decode` needs is computed again, block by block."""
        self.vae.enable_gradient_checkpointing()

    def facts(self) -> tuple[Any, ...]:
        """What of the config decides the latents."""
        config = self.vae.config
        return config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std
