"""The judge: a small classifier that says what a picture of the demo world shows.

Its logits give prompt accuracy and its penultimate features the space of the Frechet distance, as Inception's do for
photos (arXiv 1706.08500). It shares nothing with the models it judges: strided convolutions on pixels, no latents, and
it keeps the layout down to its one dense layer, because where the object is decides an attribute.
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


class Judge(nn.Module):
    """Attribute classifier for square RGB images whose side is a multiple of 16.

    Args:
        attributes: how many values each attribute has, by name.
        resolution: the side of the images in pixels.
        width: channels of the first layer; the deeper ones have 2, 3 and 4 times as many.
        dim: size of the features.
    """

    def __init__(self, attributes: Mapping[str, int], resolution: int = 64, width: int = 16, dim: int = 64) -> None:
        super().__init__()
        if resolution % 16:
            raise ValueError(f"expected a resolution that is a multiple of 16, got {resolution}; resize the images")
        self.attributes, self.resolution, self.width, self.dim = dict(attributes), resolution, width, dim
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(channels):
            layers += [nn.Conv2d(c_in, c_out, 5, stride=2, padding=2), nn.GroupNorm(4, c_out), nn.SiLU()]
            layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(4, c_out), nn.SiLU()]
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * (resolution // 16) ** 2, dim), nn.SiLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in attributes.items()})

    def features(self, pixels: Tensor) -> Tensor:
        """[B, dim] float32 penultimate features of pixels [B, 3, R, R] in [-1, 1]; what lies outside is clipped."""
        size = (3, self.resolution, self.resolution)
        if tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"expected pixels [B, {', '.join(map(str, size))}], got {list(pixels.shape)}; resize them first"
            )
        features: Tensor = self.body(pixels.float().clamp(-1, 1))
        return features

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits [B, values] of each attribute by name, for pixels [B, 3, R, R] in [-1, 1]."""
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Writes judge.safetensors and judge.json into `folder`."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}, path / WEIGHTS)
        config = {"attributes": self.attributes, "resolution": self.resolution, "width": self.width, "dim": self.dim}
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
