"""The real images that all are compared with, as numbers: moments for distances, some features for recall, others held out.

Real images that the moments don't hold say what a perfect model would score: the floor. All of it depends on the images and the
extractor alone, so it is computed once and kept in a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError
from .features import FeatureExtractor
from .moments import Moments
from .real import RealImages, WorldImages
from .writing import write_whole

KEPT = 2_000  # images whose features stay
MOST_BAD = 0.01  # share of the images that may be unreadable
_PART = 1_000  # images in memory at a time
_ABOUT = "about"  # one metadata key: safetensors writes several in random order
_NAMES = ("mean", "cov", "features", "held")

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Reference:
    """What is kept of real images.

    Attributes:
        mean: [d] float64 of their features.
        cov: [d, d] float64, unbiased.
        features: [K, d] float32 of some of them.
        held: [H, d] float32 of further ones, which mean and cov don't hold.
        about: `source` and `hash` of the images, `resolution`, `wanted_held` and `features` ({name, hash, dim}), which decide
            all else; and `count`, the images that mean and cov are of.
    """

    mean: Tensor
    cov: Tensor
    features: Tensor
    held: Tensor
    about: dict[str, Any]

    @property
    def count(self) -> int:
        """Images that the moments are of."""
        return int(self.about["count"])

    @property
    def of_the_demo(self) -> bool:
        """Whether the images are the demo's world, of which there are further ones without end."""
        return str(self.about["source"]).startswith(WorldImages.name)

    @classmethod
    def measure(
        cls,
        features: FeatureExtractor,
        images: RealImages,
        resolution: int,
        held: int = 0,
        kept: int = KEPT,
        progress: Progress = lambda done, total: None,
    ) -> Reference:
        """Reads all images once, in parts.

        Args:
            features: what they are looked at by.
            images: where they are from.
            resolution: their side in pixels.
            held: so many of them, the last of their order that can be read, are held out.
            kept: so many of the others, the first, keep their features.
            progress: gets (images done, images in all).

        Raises InputError for fewer than 2 images that are not held out, or more than 1 in 100 that can't be read.
        """
        order, moments = images.order(), Moments(features.dim)
        _check_left(len(order) - held, held, images.source)
        read = _Reader(features, images, resolution, progress)
        apart: list[Tensor] = []
        end = len(order)  # one that can't be read is made up for, or there would be no floor at `held` images
        while end and (missing := held - sum(map(len, apart))) > 0:
            start = max(0, end - min(_PART, missing))
            apart.insert(0, read(order[start:end]).float())
            end = start
        stay: list[Tensor] = []
        for start in range(0, end, _PART):
            if len(rows := read(order[start : min(start + _PART, end)])):
                moments.update(rows)
                stay.append(rows[: max(0, kept - sum(map(len, stay)))].float())
        _check_left(moments.count, held, images.source)
        about = {**_about(features, images, resolution, held), "count": moments.count}
        none = torch.empty(0, features.dim)
        return cls(moments.mean, moments.cov, torch.cat([none, *stay]), torch.cat([none, *apart]), about)

    @classmethod
    def remembered(
        cls,
        path: str | os.PathLike[str],
        features: FeatureExtractor,
        images: RealImages,
        resolution: int,
        held: int = 0,
        progress: Progress = lambda done, total: None,
    ) -> Reference:
        """From the file, if it holds these images by this extractor; else measured, and written there."""
        wanted = _about(features, images, resolution, held)
        try:
            found = cls.load(path, features)
            if {key: found.about.get(key) for key in wanted} == wanted:
                return found
        except InputError:
            pass
        found = cls.measure(features, images, resolution, held, progress=progress)
        found.save(path)
        return found

    def save(self, path: str | os.PathLike[str], flag: str = "--output_dir") -> None:
        """Writes one safetensors file, whole or not at all; InputError, which names the flag, where it can't be written."""
        tensors = {name: vars(self)[name].contiguous() for name in _NAMES}
        write_whole(path, save(tensors, metadata={_ABOUT: json.dumps(self.about, sort_keys=True)}), flag)

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: FeatureExtractor) -> Reference:
        """What `save` wrote.

        Raises:
            InputError: no such file, another kind of file, or one made with another extractor than `features`.
        """
        make = "write it again: stepdistill bench --make_reference"
        if not Path(path).is_file():
            raise InputError(f"expected reference statistics, got nothing at {path}; {make}")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
                found = cls(**{name: file.get_tensor(name) for name in _NAMES}, about=about)
            by = found.about["features"]
            other = by["hash"] != features.weights_hash
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"expected reference statistics, got {path} ({error}); {make}") from error
        if other:
            raise InputError(
                f"expected reference statistics by {features.name} ({features.weights_hash}), got those by {by['name']} "
                f"({by['hash']}) in {path}; give --features those, or {make}"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """What it is, for a protocol."""
        keys = ("source", "hash", "count", "resolution")
        return {**{key: self.about[key] for key in keys}, "kept": len(self.features), "held": len(self.held)}


def _check_left(count: int, held: int, source: str) -> None:
    if count < 2:
        raise InputError(
            f"expected 2 real images or more beside {held} that are held out, got {max(0, count)} in {source}; give more --data"
        )


class _Reader:
    """Features of real images, with a count of those that can't be read."""

    def __init__(self, features: FeatureExtractor, images: RealImages, resolution: int, progress: Progress) -> None:
        self.features, self.images, self.resolution, self.progress = features, images, resolution, progress
        self.total, self.bad, self.done = len(images.order()), 0, 0

    def __call__(self, part: Sequence[int]) -> Tensor:
        """[n, d] float64 of those that can be read; InputError for too many that can't."""
        found = [image for image in self.images.read(part, self.resolution) if image is not None]
        self.bad, self.done = self.bad + len(part) - len(found), self.done + len(part)
        if self.bad > MOST_BAD * self.total:
            raise InputError(
                f"expected images that can be read in {self.images.source}, got {self.bad} that can't; fix or remove them"
            )
        rows = self.features(np.stack(found)) if found else torch.empty(0, self.features.dim, dtype=torch.float64)
        self.progress(self.done, self.total)
        return rows


def described(features: FeatureExtractor) -> dict[str, Any]:
    """An extractor, for files."""
    return {"name": features.name, "hash": features.weights_hash, "dim": features.dim}


def _about(features: FeatureExtractor, images: RealImages, resolution: int, held: int) -> dict[str, Any]:
    return {
        "source": images.source,
        "hash": images.hash,
        "resolution": resolution,
        "wanted_held": held,
        "features": described(features),
    }
