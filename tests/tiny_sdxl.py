"""A Stable Diffusion XL pipeline of 32 pixels, with two text encoders of different widths, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import TABLE, _text, _unet, _vae

WIDTHS, PROJECTION = (16, 24), 20  # of the two text encoders' states, of the second one's pooled text
SIZE_DIM = 8  # of the embedding of each of the six sizes


def tiny_sdxl(
    folder: str | Path, *, zeros: bool = True, prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any
) -> Path:
    """Saves the pipeline into `folder` and returns it.

    Args:
        folder: made if missing.
        zeros: force_zeros_for_empty_prompt of its model_index.json.
        prediction_type: epsilon or v_prediction.
        seed: of the weights; the global generator is left as it was.
        scheduler: further fields of the DDIMScheduler.
    """
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _unet(
            cross_attention_dim=sum(WIDTHS),
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_DIM,
            projection_class_embeddings_input_dim=6 * SIZE_DIM + PROJECTION,
        )
        vae, (text_encoder, tokenizer) = _vae(), _text(WIDTHS[0])
        text_encoder_2, tokenizer_2 = _text(WIDTHS[1], PROJECTION, pad_token="'")
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=DDIMScheduler(**{**TABLE, "prediction_type": prediction_type, **scheduler}),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(str(folder))
    return Path(folder)
