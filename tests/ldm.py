"""The tiny pipelines as one file each, with the names that the original repositories gave their weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def ldm_unet(key: str) -> str:
    """The name that a weight of the tiny UNet has in CompVis' checkpoints (one layer a block, two levels)."""
    if ".resnets." in key:
        for ours, theirs in (
            ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
            ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
    place = re.match(r"(down|up|mid)_blocks?(?:\.(\d))?\.(\w+)\.(\d)\.", key)
    if place:
        side, block, part, layer = place[1], int(place[2] or 0), place[3], int(place[4])
        rest = key[place.end() :]
        if side == "mid":
            return f"middle_block.{2 * layer if part == 'resnets' else 1}.{rest}"
        if part == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0.{rest.replace('conv', 'op')}"
        if part == "upsamplers":
            return f"output_blocks.{2 * block + 1}.1.{rest}"
        first = f"input_blocks.{2 * block + layer + 1}" if side == "down" else f"output_blocks.{2 * block + layer}"
        return f"{first}.{0 if part == 'resnets' else 1}.{rest}"
    for ours, theirs in (
        ("conv_in", "input_blocks.0.0"), ("time_embedding.linear_1", "time_embed.0"), ("conv_norm_out", "out.0"),
        ("time_embedding.linear_2", "time_embed.2"), ("conv_out", "out.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def ldm_vae(key: str) -> str:
    """The same for the autoencoder (four levels)."""
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", key).replace("down_blocks", "down")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in (
        ("resnets", "block"), ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"),
        ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's second text encoder as OpenCLIP has it: queries, keys and values in one matrix, and a transposed projection."""
    names = {
        "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
        "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
        "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn",
    }  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        key = key.removeprefix("text_model.")
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    renamed["text_projection"] = renamed.pop("text_projection.weight").T.contiguous()
    for key in [k for k in renamed if ".q_proj." in k]:
        parts = [renamed.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        renamed[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return renamed


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def single_file(folder: Path, file: Path) -> Path:
    """Writes the pipeline in `folder`, Stable Diffusion or SDXL, as one file; returns it."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    second = folder / "text_encoder_2" / "model.safetensors"
    clip = {f"transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    weights = prefixed("model.diffusion_model.", {ldm_unet(k): v for k, v in unet.items()})
    weights |= prefixed("first_stage_model.", {ldm_vae(k): v for k, v in vae.items()})
    if second.exists():
        weights |= prefixed("conditioner.embedders.0.", clip)
        weights |= prefixed("conditioner.embedders.1.model.", open_clip(load_file(second)))
    else:
        weights |= prefixed("cond_stage_model.", clip)
        assert len(weights) == len(unet) + len(vae) + len(text)
    save_file(weights, file)
    return file
