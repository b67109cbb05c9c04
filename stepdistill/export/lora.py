"""A LoRA adapter as one safetensors file that stock Diffusers loads in full and at the right strength.

Two things make it so. The keys are PEFT's own behind the component's name: Diffusers guesses the format from the first
key, and with renamed attention keys beside others it drops most of the adapter with no more than a warning. And rank and
alpha travel as adapter metadata: without it the loader takes alpha = rank, which is another strength.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import InputError
from ..networks.lora import Adapters, LoraSpec
from ..networks.network import Network

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where Diffusers' loaders look


def adapter_of(student: Network) -> tuple[Adapters, str]:
    """The student's adapters and the name of its own; InputError for a network without."""
    if student.adapters is None or student.adapter is None:
        raise InputError("expected a LoRA student, got a network without an adapter; fix --student.kind lora")
    return student.adapters, student.adapter


def metadata(spec: LoraSpec, prefix: str) -> dict[str, str]:
    """The file's metadata: the arguments of PEFT's LoraConfig that are not defaults, as sorted JSON under one key.

    One key, because safetensors writes several in random order; few arguments, because an older PEFT raises for one that
    it does not know.
    """
    config = spec.peft_config()
    arguments = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    return {METADATA_KEY: json.dumps({f"{prefix}.{k}": v for k, v in arguments.items()}, sort_keys=True)}


def save_lora(student: Network, folder: str | Path, dtype: torch.dtype = torch.float32, prefix: str = "unet") -> Path:
    """Writes `pytorch_lora_weights.safetensors` into `folder` (made if missing) and returns its path.

    Equal weights give equal bytes.

    Args:
        student: a network with an adapter; its weights now are what is saved (enter `ema.applied()` for the average).
        dtype: of the saved weights.
        prefix: the pipeline component that the adapter is for: unet or transformer.
    """
    adapters, name = adapter_of(student)
    tensors = {
        f"{prefix}.{key}": p.detach().to("cpu", dtype, copy=True).contiguous()
        for key, p in sorted(adapters.parameters(name).items())
    }
    bad = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise InputError(
            f"expected finite weights, got nan or inf as {dtype} in {len(bad)} of {len(tensors)} tensors, first {bad[0]}; "
            "export an earlier checkpoint, or --export.dtype fp32"
        )
    path = Path(folder) / WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata(adapters.specs[name], prefix))
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    return path
