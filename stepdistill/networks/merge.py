"""A LoRA student as one plain network: for backbones that no stock loader reads an adapter for."""

from __future__ import annotations

import copy

from torch import nn

from .network import Network


def merged(student: Network) -> nn.Module:
    """A copy of the student's module with its adapter added into the weights, W + (alpha / rank) B A, in float32.

    Names and classes are those of the stock module, so that its `save_pretrained` writes what `from_pretrained` reads. The
    student stays as it is. Computes what the student computes, to rounding. Raises ValueError for a student without adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if student.adapters is None or student.adapter is None:
        raise ValueError("expected a LoRA student to merge, got a network without an adapter; use its module as it is")
    module = copy.deepcopy(student.module).float()
    layers = {n: layer for n, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        if student.adapter in layer.lora_A:
            layer.merge(adapter_names=[student.adapter])
        module.set_submodule(name, layer.get_base_layer())
    _forget_peft(module)
    return module.eval()


def _forget_peft(module: nn.Module) -> None:
    """Takes off what PEFT and Diffusers noted on the module, which would make it refuse to be adapted or saved."""
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        module.__dict__.pop(attribute, None)
