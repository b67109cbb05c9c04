"""A module with adapters as one plain module: with its adapter in the weights, or without any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from .network import Network


def merged(student: Network) -> nn.Module:
    """A copy of the student's module with its adapter added into the weights, W + (alpha / rank) B A, in float32.

    Names and classes are those of the stock module, so that its `save_pretrained` writes what `from_pretrained` reads. The
    student stays as it is. Computes what the student computes, to rounding. Raises ValueError for a student without adapter.
    """
    if student.adapters is None or student.adapter is None:
        raise ValueError("expected a LoRA student to merge, got a network without an adapter; use its module as it is")
    module, adapter = copy.deepcopy(student.module).float(), student.adapter
    return _plain(
        module, lambda layer: layer.merge(adapter_names=[adapter]) if adapter in layer.lora_A else None
    ).eval()


def bare(network: Network) -> nn.Module:
    """A frozen copy of the network's module as it was before any adapter came to it, in eval mode."""
    module = copy.deepcopy(network.module)
    return (module if network.adapters is None else _plain(module)).requires_grad_(False).eval()


def _plain(module: nn.Module, before: Callable[[Any], None] | None = None) -> nn.Module:
    """Takes the adapters' layers out of `module`, after `before` has seen each, and what PEFT and Diffusers noted on it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {n: layer for n, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        if before is not None:
            before(layer)
        module.set_submodule(name, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):  # which would make it refuse to be adapted or saved
        module.__dict__.pop(attribute, None)
    return module
