"""The judge: a small classifier that says what a picture of the demo world shows.

Its logits give prompt accuracy and its activations the space of the Frechet distance, as Inception's do for photos (arXiv
1706.08500). It shares nothing with the models it judges: strided convolutions on pixels, no latents, and it keeps the layout
down to its one dense layer, because which object is where decides an attribute.

A classifier's last layer forgets what its classes don't need, blur for one. So the features hold the spatial means of an early
stage as well, and all of them in units of their standard deviation over real images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError

WEIGHTS, CONFIG = "judge.safetensors", "judge.json"
EARLY = 1  # the stage whose means are features: strokes and textures, at a quarter of the resolution


class Judge(nn.Module):
    """Attribute classifier for square RGB images whose side is a multiple of 16.

    Args:
        attributes: how many values each attribute has, by name.
        resolution: the side of the images in pixels.
        width: channels of the first stage; the deeper ones have 2, 3 and 4 times as many.
        dense: size of the last layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, attributes: Mapping[str, int], resolution: int = 64, width: int = 16, dense: int = 64) -> None:
        super().__init__()
        if resolution % 16:
            raise ValueError(f"expected a resolution that is a multiple of 16, got {resolution}; resize the images")
        self.attributes, self.resolution, self.width, self.size = dict(attributes), resolution, width, dense
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        self.stages = nn.ModuleList(_stage(c_in, c_out) for c_in, c_out in pairwise(channels))
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * (resolution // 16) ** 2, dense), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(dense, count) for name, count in attributes.items()})
        self.dim = channels[EARLY + 1] + dense
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("std", torch.ones(self.dim))

    def _read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The early stage's means [B, 2 width] and the dense layer [B, dense] of pixels; what lies outside is clipped."""
        size = (3, self.resolution, self.resolution)
        if tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"expected pixels [B, {', '.join(map(str, size))}], got {list(pixels.shape)}; resize them first"
            )
        x, early = pixels.float().clamp(-1, 1), pixels
        for i, stage in enumerate(self.stages):
            x = stage(x)
            early = x if i == EARLY else early
        return early.mean((2, 3)), self.dense(x)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, dim] float32 features, standardised over real images, of pixels [B, 3, R, R] in [-1, 1]."""
        return (torch.cat(self._read(pixels), 1) - self.mean) / self.std

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits [B, values] of each attribute by name, for pixels [B, 3, R, R] in [-1, 1]."""
        _, dense = self._read(pixels)
        return {name: head(dense) for name, head in self.heads.items()}

    @torch.no_grad()
    def standardise(self, pixels: Tensor) -> None:
        """Sets the units of the features: mean 0 and variance 1 over these real images [N, 3, R, R]."""
        raw = torch.cat([torch.cat(self._read(part), 1) for part in pixels.split(250)]).double()
        self.mean.copy_(raw.mean(0))
        self.std.copy_(raw.std(0).clamp(min=1e-6))

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Writes judge.safetensors and judge.json into `folder`."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}, path / WEIGHTS)
        config = {"attributes": self.attributes, "resolution": self.resolution, "width": self.width, "dense": self.size}
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Judge:
        """The judge that `save` wrote, in float32, in eval mode, frozen.

        Raises:
            InputError: the folder holds no judge.
        """
        from safetensors.torch import load_file

        path = Path(folder)
        missing = [name for name in (WEIGHTS, CONFIG) if not (path / name).is_file()]
        if missing:
            raise InputError(
                f"expected a judge in {path}, got no {' and no '.join(missing)}; fix the path or make the judge again"
            )
        judge = cls(**json.loads((path / CONFIG).read_text(encoding="utf-8")))
        judge.load_state_dict({name: value.float() for name, value in load_file(path / WEIGHTS).items()})
        return judge.requires_grad_(False).eval()


def _stage(c_in: int, c_out: int) -> nn.Sequential:
    """Half the resolution by a strided convolution, then one in place."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 5, stride=2, padding=2), nn.GroupNorm(4, c_out), nn.SiLU(),
        nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(4, c_out), nn.SiLU(),
    )  # fmt: skip
