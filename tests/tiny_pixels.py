"""A DDPM or DDIM pipeline on 16 pixels, unconditional or with classes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 16


def tiny_pixels(
    folder: str | Path,
    *,
    classes: int | None = None,
    channels: int = 3,
    prediction_type: str = "epsilon",
    pipeline: str = "DDPMPipeline",
    seed: int = 0,
    **unet: Any,
) -> Path:
    """Saves the pipeline into `folder` and returns it.

    Args:
        folder: made if missing.
        classes: num_class_embeds of the network.
        channels: 3 or 1.
        prediction_type: epsilon, v_prediction or sample.
        pipeline: DDPMPipeline or DDIMPipeline.
        seed: of the weights; the global generator is left as it was.
        unet: further fields of the UNet2DModel.
    """
    import diffusers

    options = {
        "sample_size": SIDE, "in_channels": channels, "out_channels": channels, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "num_class_embeds": classes,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = diffusers.UNet2DModel(**{**options, **unet})
    kind = {"DDPMPipeline": diffusers.DDPMScheduler, "DDIMPipeline": diffusers.DDIMScheduler}[pipeline]
    scheduler = kind(clip_sample=False, prediction_type=prediction_type)
    getattr(diffusers, pipeline)(unet=net, scheduler=scheduler).save_pretrained(str(folder))
    return Path(folder)
