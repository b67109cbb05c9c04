"""A Stable Diffusion pipeline of 32 pixels and some 50,000 weights, made from a seed in about a second, for tests."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

RESOLUTION = 32
LENGTH = 24  # tokens of a prompt; one letter is one token
TABLE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
CHARACTERS = string.ascii_lowercase + string.digits + ",.'-"


def _unet(**changes: Any) -> Any:
    """Every kind of module that LCM-LoRA adapts is there: two levels, attention in one, a skip with a shortcut."""
    from diffusers import UNet2DConditionModel

    options = {
        "sample_size": RESOLUTION // 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**{**options, **changes})


def _vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    options = {
        "sample_size": RESOLUTION,
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    return AutoencoderKL(**{**options, **changes})


def _text(width: int = 16, projection: int | None = None, **tokens: Any) -> tuple[Any, Any]:
    """(text encoder, tokenizer): CLIP's, with the letters, digits and a few signs as vocabulary.

    Args:
        width: of its states.
        projection: of the pooled text that it projects, where it does.
        tokens: further arguments of the tokenizer, e.g. pad_token.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=LENGTH, **tokens)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), tokenizer


def tiny_pipeline(folder: str | Path, *, prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any) -> Path:
    """Saves the pipeline into `folder` and returns it.

    Args:
        folder: made if missing.
        prediction_type: epsilon, v_prediction or sample.
        seed: of the weights; the global generator is left as it was.
        scheduler: further fields of the DDIMScheduler, e.g. rescale_betas_zero_snr=True.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae, (text_encoder, tokenizer) = _unet(), _vae(), _text()
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**{**TABLE, "prediction_type": prediction_type, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder))
    return Path(folder)


def tiny_images(folder: str | Path, count: int = 12, resolution: int = RESOLUTION, seed: int = 0) -> Path:
    """Writes `count` noise images 00.png, 01.png, ... with a caption file beside each; returns the folder."""
    draws = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.fromarray(draws.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8))
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i % 5}\n", encoding="utf-8")
    return folder
