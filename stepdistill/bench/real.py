"""Real images to compare with: the demo's reference world, or whatever `--data` names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.config import DataConfig
from ..data.images import ImageSource
from ..data.open import open_source
from ..data.pictures import Unreadable
from ..demo.world import REFERENCE_SEED, World
from ..errors import InputError
from ..randomness import generator
from .features import to_images

Picture = NDArray[np.uint8]
COUNT = 20_000  # images of the demo's reference world


class RealImages(Protocol):
    """Where real images come from."""

    @property
    def source(self) -> str:
        """For people."""

    @property
    def hash(self) -> str:
        """Tells one set of images from another."""

    def order(self) -> Sequence[int]:
        """The indices of all images, in an order that has nothing to do with what they show."""

    def read(self, indices: Sequence[int], resolution: int) -> list[Picture | None]:
        """uint8 [R, R, 3] of each of these images; None for one that can't be read."""


class WorldImages:
    """The first images of the demo's reference world, whose scenes come in no order.

    Args:
        count: how many.
    """

    name = "the demo's reference world"

    def __init__(self, count: int = COUNT) -> None:
        self.count, self.source = count, f"{self.name} (seed {REFERENCE_SEED}), its first {count} images"
        self.hash = f"world-{REFERENCE_SEED}-{count}"

    def order(self) -> Sequence[int]:
        return range(self.count)

    def read(self, indices: Sequence[int], resolution: int) -> list[Picture | None]:
        return list(to_images(World(REFERENCE_SEED, resolution).pixels(indices)))


class DataImages:
    """The images of a folder, of tar shards or of a data set, centre squares of them; read as training data is.

    Args:
        path: as --data takes it.

    Raises InputError for what holds no images.
    """

    def __init__(self, path: str) -> None:
        try:
            source: Any = open_source(DataConfig(path=path, caption_column="none"))
        except InputError as error:
            raise InputError(str(error).replace("--data.path", "--data")) from error
        if not isinstance(source, ImageSource):
            raise InputError(
                f"expected images in --data, got prompts in {path!r}; give a folder of images or a data set with images"
            )
        if len(source) < 2:
            raise InputError(f"expected 2 real images or more in --data {path}, got {len(source)}; give more")
        self._images = source
        self.source, self.hash = f"{path} ({len(source)} images)", source.fingerprint()[:16]

    def held(self, n: int | None) -> int:
        """How many to hold out for sweeps of n images: n where as many are left, else a fifth of all."""
        count = len(self._images)
        return n if n is not None and count >= 2 * n else count // 5

    def order(self) -> Sequence[int]:
        """Shuffled: folders are often sorted by what is shown."""
        order: list[int] = generator(0, "bench/reference").permutation(len(self._images)).tolist()
        return order

    def read(self, indices: Sequence[int], resolution: int) -> list[Picture | None]:
        def one(index: int) -> Picture | None:
            try:
                pixels = self._images.pictures(index, resolution)[0].pixels
            except Unreadable:
                return None
            return to_images(pixels[None])[0]

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter's lock
            return list(pool.map(one, indices))
