"""Nested training states in two parts that need no pickle: tensors by name for safetensors, the rest for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def split_state(state: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Takes nested dicts, lists and tuples of tensors and scalars apart, for safetensors and for JSON.

    Returns:
        (name -> tensor, the same nesting in JSON). Where JSON would lose something, it holds a dict with one key that
        starts with "$": the name of a tensor, the items of a dict with keys other than strings, a tuple, NaN, infinity.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(dict(state), "", tensors)


def join_state(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of :func:`split_state`: the same types, keys, dtypes and bits."""
    joined: dict[Any, Any] = _decode(dict(scalars), tensors)
    return joined


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path
        while name in tensors or name in ("", "__metadata__"):  # keys 0 and "0" share a path
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, dict):
        items = [(k, _encode(v, f"{path}.{k}" if path else str(k), tensors)) for k, v in value.items()]
        if all(type(k) is str and not k.startswith("$") for k in value):
            return dict(items)
        return {"$items": [[_encode(k, "", {}), v] for k, v in items]}
    if isinstance(value, (list, tuple)):
        inner = [_encode(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        return {"$tuple": inner} if isinstance(value, tuple) else inner
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(float(value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"expected tensors, numbers, strings, None, lists and dicts in a state, got {type(value)} at {path!r}"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag == "$tensor":
            return tensors[inner]
        if tag == "$float":
            return float(inner)
        if tag == "$tuple":
            return tuple(_decode(v, tensors) for v in inner)
        if tag == "$items":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in inner}
    return {k: _decode(v, tensors) for k, v in value.items()}
