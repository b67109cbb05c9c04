"""A Stable Diffusion 3 pipeline of 32 pixels, with two CLIPs and a T5 or without the latter, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import CHARACTERS, RESOLUTION, _text, _vae

CHANNELS, SHIFT, SCALE = 6, 0.25, 1.5  # of the latents: more than RGB's four, so that nothing fits by accident
WIDTHS, PROJECTIONS = (16, 24), (20, 28)  # of the two CLIPs' states and pooled texts
T5_WIDTH = 48  # more than both CLIPs' together, as in the published models


def t5(width: int = T5_WIDTH) -> tuple[Any, Any]:
    """(text encoder, tokenizer): T5's, of whose pieces each is one letter."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def vae16() -> Any:
    """An autoencoder without the two convolutions around the latents, whose scale and shift are not the defaults."""
    return _vae(
        latent_channels=CHANNELS,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_sd3(
    folder: str | Path, *, with_t5: bool = True, new: bool = False, shift: float = 3.0, seed: int = 0, **scheduler: Any
) -> Path:
    """Saves the pipeline into `folder` and returns it.

    Args:
        folder: made if missing.
        with_t5: whether it has its third text encoder.
        new: 3.5's blocks: normalised queries and keys, a second attention in the first block.
        shift: of its scheduler.
        seed: of the weights; the global generator is left as it was.
        scheduler: further fields of the FlowMatchEulerDiscreteScheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    blocks = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if new else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=RESOLUTION // 8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=T5_WIDTH, caption_projection_dim=16,
            pooled_projection_dim=sum(PROJECTIONS), pos_embed_max_size=6, **blocks,
        )  # fmt: skip
        randomise_modulation(transformer)
        vae = vae16()
        (first, tokenizer), (second, tokenizer_2) = (_text(w, p) for w, p in zip(WIDTHS, PROJECTIONS, strict=True))
        third, tokenizer_3 = t5() if with_t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, **scheduler),
    )
    pipeline.save_pretrained(str(folder))
    return Path(folder)


def randomise_modulation(transformer: Any) -> None:
    """Larger weights where time, text and guidance come in, whose defaults hardly move so small a network's output."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "norm" in name and name.endswith("linear.weight") or "time_text_embed" in name:
                weight.normal_(std=0.2)
