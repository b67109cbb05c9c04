"""Logits in float32 of hidden states in 16 bits, with a graph: autocast would round them as it rounds hidden states.

Logits of a vocabulary share a large part that a softmax cancels (GPT-2's lie near -60, where bfloat16 has steps of 0.25), and
log-probabilities made of rounded ones are off by as much. Factors of the products have autocast's precision; sums have not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunked import Layer, wide
from .head import Head


def wide_logits(hidden: Tensor, head: Head) -> Tensor:
    """Hidden states [N, H] -> logits [N, V] in float32 (float64 where those are), differentiable once."""
    found: Tensor = _WideLogits.apply(hidden, head.weight, head.bias, head.softcap)
    return found


class _WideLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
        layer = Layer(Head(weight, bias, softcap), len(weight), wide(hidden))  # looks at autocast
        z = hidden.new_empty(len(hidden), len(weight), dtype=layer.wide)
        with torch.autocast(hidden.device.type, enabled=False):
            layer.write(hidden, z)
        ctx.layer, ctx.shape, ctx.dtypes = layer, weight.shape, (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden, z if softcap is not None else None)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, z = ctx.saved_tensors
        layer, (weight_dtype, bias_dtype) = ctx.layer, ctx.dtypes
        to_h, to_weight, to_bias, _ = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None, None]
        with torch.autocast(hidden.device.type, enabled=False):
            if z is not None:
                gradient = gradient * (1.0 - (z / layer.softcap).square())  # of c tanh(z / c)
            if to_h:
                out = hidden.new_zeros(hidden.shape, dtype=layer.wide)
                layer.to_hidden(gradient, out)
                found[0] = out.to(hidden.dtype)
            if to_weight:
                out = hidden.new_zeros(ctx.shape, dtype=layer.wide)
                layer.to_weight(gradient, hidden, out)
                found[1] = out.to(weight_dtype)
            if to_bias:
                found[2] = gradient.sum(0).to(bias_dtype)
        return (*found, None)
