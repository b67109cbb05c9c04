"""The pixel discriminator's eye: features of pictures in a vision network that stays as it is (arXiv 2311.17042, section 3.2).

Its weights never move; gradients pass through it to the pixels. Which checkpoint it is, is another object's matter
(`families/eyes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from .network import Module

Size = tuple[int, int]  # height, width


class ImageFeatures:
    """Maps of features at several blocks of a vision network, of pictures of any size.

    Args:
        net: a module that is called with `pixel_values` [B, 3, h, w]; frozen here. Its blocks give maps [B, C, h, w], or tokens
            [B, k + h w, C] in rows, the first k of which (class and registers) are left out.
        names: of the submodules to tap.
        size: (height, width) that pictures are resized to.
        mean, std: of each channel of pixels in [0, 1], which they are normalised with.
        patch: pixels a side of what becomes one token.
        prefix: how many tokens there may be before those of the patches.
        bilinear: how pictures are resized, with the filter of that name rather than the bicubic; both are antialiased.
        options: for each call of the network.

    Raises InputError for a size that isn't a multiple of the patch, names that are no submodules, and features without places.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        size: Size,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        patch: int = 1,
        prefix: int = 0,
        bilinear: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.net, self.names, self.size = Module(net.requires_grad_(False).eval()), tuple(names), size
        self.patch, self.prefix, self.bilinear, self.options = patch, prefix, bilinear, dict(options or {})
        if any(side % patch or side < patch for side in size):
            raise InputError(
                f"expected a size that is a multiple of {patch} pixels, the backbone's patch, got {size[0]}x{size[1]}; fix "
                f"--eye.size ({max(patch, round(size[0] / patch) * patch)} is the nearest)"
            )
        known = {name for name, _ in net.named_modules() if name}
        if missing := [name for name in self.names if name not in known]:
            raise InputError(
                f"expected names of the eye's modules to tap, got {missing[0]!r}; fix --method.taps (its blocks are "
                f"{', '.join(blocks(net)[:3]) or 'unknown'}, ...)"
            )
        if not self.names:
            raise InputError(
                "expected one tap or more, got none: this network has no blocks; name modules with --method.taps"
            )
        self._mean, self._std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
        self._resizers: dict[tuple[int, int], Tensor] = {}

    def to(self, device: torch.device | str) -> Self:
        """Moves the network; returns self."""
        self.net.module.to(device)
        self._resizers.clear()
        return self

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] at each of `names`, of pixels [B, 1 or 3, H, W] in about [-1, 1]; differentiable."""
        with self.net.taps(self.names) as kept:
            self.net(pixel_values=self.prepared(pixels), **self.options)
        return [self._map(name, kept.get(name)) for name in self.names]

    def pooled(self, pixels: Tensor) -> Tensor:
        """[B, P]: what the network says of a picture as a whole: its projection or pooled output, or the mean of its tokens."""
        output = self.net(pixel_values=self.prepared(pixels), **self.options)
        for key in ("image_embeds", "pooler_output"):
            if output.get(key) is not None:
                return output[key].flatten(1)
        return output["last_hidden_state"].mean(1)

    def prepared(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w]: resized, normalised; grey becomes three channels."""
        x = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        with torch.autocast(x.device.type, enabled=False):  # whose products would round the pixels
            for axis, side in ((-2, self.size[0]), (-1, self.size[1])):
                x = self._resized(x, axis, side)
            mean, std = (values.to(x) for values in (self._mean, self._std))
            return ((x + 1.0) / 2.0 - mean) / std

    def _resized(self, x: Tensor, axis: int, side: int) -> Tensor:
        """One axis at another length, by a matrix: a convolution's derivative adds in any order on accelerators."""
        length = x.shape[axis]
        if length == side:
            return x
        if (length, side) not in self._resizers:
            self._resizers[length, side] = resizer(length, side, self.bilinear).to(x.device)
        matrix = self._resizers[length, side].to(x)
        return matrix @ x if axis == -2 else x @ matrix.T

    def _map(self, name: str, feature: Any) -> Tensor:
        if feature is None:
            raise InputError(
                f"expected modules that the eye computes with, got {name!r}, which it calls nothing of by that name; fix "
                "--method.taps"
            )
        if isinstance(feature, Tensor) and feature.ndim == 4:
            return feature
        h, w = (side // self.patch for side in self.size)
        if isinstance(feature, Tensor) and feature.ndim == 3 and 0 <= (more := feature.shape[1] - h * w) <= self.prefix:
            return feature[:, more:].transpose(1, 2).unflatten(2, (h, w))
        found = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise InputError(
            f"expected a map, or {h}x{w} tokens and up to {self.prefix} before them, at {name!r}, got {found}; tap another "
            "module with --method.taps, or give --eye.path a vision transformer such as a DINOv2"
        )


def resizer(length: int, side: int, bilinear: bool = False) -> Tensor:
    """[side, length]: the matrix that an antialiased resize of one axis is."""
    unit = torch.eye(length)[None, None]
    mode = "bilinear" if bilinear else "bicubic"
    return functional.interpolate(unit, (side, length), mode=mode, align_corners=False, antialias=True)[0, 0]


def blocks(net: nn.Module) -> list[str]:
    """Names of the blocks that a network repeats: the members of its longest list of modules."""
    lists = {name: module for name, module in net.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return []
    name = max(lists, key=lambda key: len(lists[key]))
    return [f"{name}.{i}" if name else str(i) for i in range(len(lists[name]))]


def evenly(names: Sequence[str], count: int = 4) -> list[str]:
    """Up to `count` of the names, evenly spaced, the last one among them: blocks 2, 5, 8 and 11 of 12."""
    ends = [(i + 1) * len(names) // count - 1 for i in range(count)]
    return [names[i] for i in sorted({end for end in ends if end >= 0})]
