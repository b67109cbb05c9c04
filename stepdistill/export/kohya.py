"""A LoRA adapter in the layout of kohya's trainers, which web UIs read: `lora_unet_<module>.lora_down.weight`.

Modules keep the names they have in Diffusers, joined by "_", for SD and SDXL alike: Diffusers' converter
(`_convert_non_diffusers_lora_to_diffusers`) maps them back one to one, and leaves names without the blocks of the original
code (`input_blocks`, ...) out of its block renumbering. kohya's own trainer names the modules of SDXL after those blocks;
which of the two a given tool reads for SDXL is for that tool to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..networks.lora import LoraSpec
from .lora import Layout
from .part import component

KOHYA = "lora_kohya.safetensors"  # does not end like Diffusers' own file, which a folder is searched for
SIDES = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def kohya_layout(pipeline: Any) -> Layout:
    """For an adapter of this stock pipeline's UNet; InputError for a transformer, which has other layouts."""
    if component(pipeline) != "unet":
        raise InputError("expected a UNet for the kohya layout, got a transformer; fix --export.formats diffusers")
    version = base_version(pipeline)

    def metadata(spec: LoraSpec) -> dict[str, str]:
        convolutions = {"conv_dim": str(spec.rank), "conv_alpha": str(spec.alpha)}
        return {
            "ss_base_model_version": version,
            "ss_v2": str(version.startswith("sd_v2")),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(spec.rank),
            "ss_network_alpha": str(spec.alpha),
            "ss_network_args": json.dumps(convolutions),
        }

    return Layout(KOHYA, _key, metadata, _alphas)


def base_version(pipeline: Any) -> str:
    """The name of the base as kohya's trainers write it: sd_v1, sd_v2, with "_v" for v-prediction, or sdxl_base_v1-0."""
    if "text_encoder_2" in pipeline.components:
        return "sdxl_base_v1-0"
    version = "sd_v2" if pipeline.unet.config.cross_attention_dim == 1024 else "sd_v1"
    return version + "_v" * (pipeline.scheduler.config.prediction_type == "v_prediction")


def _key(name: str) -> str:
    for ours, kohya in SIDES.items():
        if name.endswith(ours):
            return "lora_unet_" + name.removesuffix(ours).replace(".", "_") + kohya
    raise ValueError(f"expected the name of a LoRA weight, got {name!r}")


def _alphas(keys: Iterable[str], spec: LoraSpec) -> dict[str, Tensor]:
    """A scalar for each module, whatever dtype the weights are in: a rounded alpha is another strength."""
    single = torch.tensor(spec.alpha, dtype=torch.float32)
    exact = single.item() == spec.alpha  # float64 only where it takes it, since not every device has it
    alpha = single if exact else torch.tensor(spec.alpha, dtype=torch.float64)
    return {f"{key.split('.')[0]}.alpha": alpha.clone() for key in keys}
