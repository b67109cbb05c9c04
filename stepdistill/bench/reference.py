"""The real images that all are compared with, as numbers: moments for distances, some features for recall.

They depend on nothing but the judge and the world's reference seed, so they are computed once and shipped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..demo.world import REFERENCE_SEED, World
from ..errors import InputError
from .features import JudgeFeatures, to_images

COUNT, KEPT = 20_000, 2_000
_PART = 1_000  # images in memory at a time


@dataclass(frozen=True)
class Reference:
    """What is kept of the first `count` images of the reference world.

    Attributes:
        mean: [d] float64 of their features.
        cov: [d, d] float64, unbiased.
        features: [K, d] float32 of the first K of them.
        count: how many there were.
        weights_hash: of the extractor; features of another one don't compare.
    """

    mean: Tensor
    cov: Tensor
    features: Tensor
    count: int
    weights_hash: str

    @classmethod
    def measure(cls, features: JudgeFeatures, resolution: int, count: int = COUNT, kept: int = KEPT) -> Reference:
        """Draws the images and reads them; `kept` of their features stay as they are."""
        world = World(REFERENCE_SEED, resolution)
        parts = [range(first, min(first + _PART, count)) for first in range(0, count, _PART)]
        every = torch.cat([features(to_images(world.pixels(part))) for part in parts])
        return cls(every.mean(0), every.T.cov(), every[:kept].float(), count, features.weights_hash)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file."""
        from safetensors.torch import save_file

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean, "cov": self.cov, "features": self.features}
        facts = {"count": str(self.count), "weights_hash": self.weights_hash}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: JudgeFeatures) -> Reference:
        """What `save` wrote.

        Raises:
            InputError: no such file, another kind of file, or one made with another judge than `features`.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"expected reference statistics, got nothing at {path}; python benchmarks/demo_teacher.py")
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("mean", "cov", "features")}
            found = cls(**tensors, count=int(facts["count"]), weights_hash=facts["weights_hash"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"expected reference statistics, got {path} ({error}); python benchmarks/demo_teacher.py writes them"
            ) from error
        if found.weights_hash != features.weights_hash:
            raise InputError(
                f"expected reference statistics of judge {features.weights_hash}, got those of {found.weights_hash} in "
                f"{path}; write them again: python benchmarks/demo_teacher.py"
            )
        return found
