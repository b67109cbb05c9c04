"""A stand-in for tensors on Apple's GPUs, which have no float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class OnMPS(Tensor):
    """Computes as on the CPU, and so does what is made of it; refuses float64 until it is moved there by `cpu`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return found.as_subclass(Tensor)
        if isinstance(found, cls) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return found


def on_mps(tensor: Tensor) -> Tensor:
    """The same numbers, there."""
    return tensor.as_subclass(OnMPS)
