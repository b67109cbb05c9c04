"""A Flux pipeline of 32 pixels, with a guidance embedding or without, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import _text
from tiny_sd3 import CHANNELS, T5_WIDTH, randomise_modulation, t5, vae16

WIDTH = 20  # of CLIP's pooled text


def tiny_flux(folder: str | Path, *, guidance: bool = True, seed: int = 0, **scheduler: Any) -> Path:
    """Saves the pipeline into `folder` and returns it.

    Args:
        folder: made if missing.
        guidance: whether its network has a guidance embedding, as dev has.
        seed: of the weights; the global generator is left as it was.
        scheduler: further fields of the FlowMatchEulerDiscreteScheduler, whose shift is dynamic.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=T5_WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        randomise_modulation(transformer)
        vae, (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = vae16(), _text(WIDTH), t5()
    options = {"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
    pipeline = FluxPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(**options),
    )
    pipeline.save_pretrained(str(folder))
    return Path(folder)
