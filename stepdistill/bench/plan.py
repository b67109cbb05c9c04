"""Which images every cell makes: one a prompt, and of the first prompts some more, in batches that are cut once and for all.

The batches don't depend on who makes them, so any number of processes feeds the networks the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .promptfile import fingerprint

DIVERSITY = (40, 8)  # prompts whose diversity is looked at, and images of each
APART = 1_000_000  # index of the first of those images: their noise is no other image's


@dataclass(frozen=True)
class Batch:
    """What one call of a pipeline makes.

    Attributes:
        number: its place among the batches of a cell.
        start: index of the first image, to which its noise belongs.
        prompts: one an image.
        varied: whether these are the further images of the first prompts.
    """

    number: int
    start: int
    prompts: tuple[str, ...]
    varied: bool


@dataclass(frozen=True)
class Plan:
    """The images of each cell, the same for all.

    Attributes:
        prompts: N of them; image i is of prompt i, and its noise is a function of (seed, i).
        source: where the prompts are from, for people.
        seed: of the noise.
        diversity: (prompts, images): of so many first prompts so many images, apart from the N; (0, 0) for none.
        batch_size: images a call; changes them by rounding only.
        resolution: side of the images in pixels; the models' own by default.

    Raises InputError for fewer than 2 prompts, or more than there is room for.
    """

    prompts: tuple[str, ...]
    source: str
    seed: int = 0
    diversity: tuple[int, int] = DIVERSITY
    batch_size: int = 50
    resolution: int | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise InputError(
                f"expected at least 2 images a configuration, got {len(self.prompts)}; raise the number of images: more "
                "--prompts, or a higher --num_images"
            )
        if len(self.prompts) > APART:
            raise InputError(
                f"expected at most {APART} images a configuration, got {len(self.prompts)}; lower --num_images"
            )
        if self.batch_size < 1:
            raise InputError(f"expected --batch_size of 1 or more, got {self.batch_size}; raise it")
        if self.diversity != (0, 0) and (self.diversity[0] < 1 or self.diversity[1] < 2):
            raise InputError(
                f"expected 1 prompt or more and 2 images or more of each for diversity, got {self.diversity}; raise "
                "--diversity_images, or give 0 for none"
            )

    @property
    def spread(self) -> tuple[int, int]:
        """`diversity` where there are so many prompts."""
        prompts, images = self.diversity
        return min(prompts, len(self.prompts)), images

    @property
    def varied(self) -> tuple[str, ...]:
        """The prompts of the images for diversity, each as often as it has images, in turn."""
        prompts, images = self.spread
        return tuple(prompt for prompt in self.prompts[:prompts] for _ in range(images))

    def batches(self) -> list[Batch]:
        """All batches of a cell."""
        return list(self._cut())

    def _cut(self) -> Iterator[Batch]:
        number = 0
        for prompts, first, varied in ((self.prompts, 0, False), (self.varied, APART, True)):
            for i in range(0, len(prompts), self.batch_size):
                yield Batch(number, first + i, prompts[i : i + self.batch_size], varied)
                number += 1

    @property
    def options(self) -> dict[str, Any]:
        """What pipelines are called with beside prompts, steps and guidance."""
        return {} if self.resolution is None else {"height": self.resolution, "width": self.resolution}

    def identity(self) -> dict[str, Any]:
        """What the images depend on."""
        return {
            "prompts": fingerprint(self.prompts),
            "num_images": len(self.prompts),
            "seed": self.seed,
            "diversity": list(self.spread),
            "batch_size": self.batch_size,
            "resolution": self.resolution,
        }
