"""What a cache or an export is keyed with: a hash of weights and of the facts around them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fingerprint(facts: object, *modules: nn.Module) -> str:
    """A hash of `facts` (by their repr) and of the modules' weights, bit for bit; LoRA adapters on them don't count."""
    return hashed(
        facts,
        *(
            {n.replace(".base_layer", ""): v for n, v in module.state_dict().items() if "lora_" not in n}
            for module in modules
        ),
    )


def hashed(facts: object, *tensors: Mapping[str, Tensor]) -> str:
    """The same of named tensors."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for named in tensors:
        for name, value in sorted(named.items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
