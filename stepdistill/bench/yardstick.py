"""What every cell of a sweep is measured with: the images it makes, what they are looked at by, and the real ones beside them.

For the demo everything has a known best, since its world draws what a caption asks for: real images of the very same captions
give the floor of the distance, the ceiling of the accuracy, and the diversity within a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..demo.world import TEST_SEED, World
from ..errors import InputError
from .features import FeatureExtractor, JudgeFeatures, to_images
from .judge import Judge
from .plan import DIVERSITY, Plan
from .quality import RESAMPLES, Measure
from .quantities import ACCURACY
from .real import WorldImages
from .reference import Reference, described
from .rows import Cell, Quality
from .samples import SCORE, Samples, measured
from .scores import JudgeAccuracy, Scorer

N = 1200  # images a configuration
_PART = 500
SOURCE = f"captions of the demo's test world (seed {TEST_SEED})"


class Yardstick:
    """Measures cells of one plan.

    Args:
        plan: which images each cell makes.
        features: what they are compared by.
        scorers: by the key of their quantity.
        measure: what the numbers are made by.
        sizes: numbers of images that rows are made for, the first so many; all of them by default.
        resolution: side of the images in pixels, of the real ones too.

    Raises InputError for sizes below 2.
    """

    def __init__(
        self,
        plan: Plan,
        features: FeatureExtractor,
        scorers: Mapping[str, Scorer],
        measure: Measure,
        sizes: Sequence[int] = (),
        resolution: int = 64,
    ) -> None:
        self.plan, self.features, self.scorers, self.measure = plan, features, dict(scorers), measure
        self.sizes, self.n = tuple(sizes) or (len(plan.prompts),), len(plan.prompts)
        if min(self.sizes) < 2:
            raise InputError(
                f"expected at least 2 images a configuration, got {self.sizes}; raise the number of images"
            )
        self.resolution = resolution
        self.real = measure.real(self._real(), self.sizes)

    def _real(self) -> Samples | None:
        """Samples of real images: of the plan's own captions where the world can draw them, else those held out."""
        reference = self.measure.reference
        if not reference.of_the_demo:
            return Samples(reference.held, None, {}, None, 0.0) if len(reference.held) > 1 else None
        test = World(TEST_SEED, self.resolution)
        asked = self.plan.source == SOURCE
        parts = [
            measured(to_images(test.pixels(part)), self.plan.prompts[part.start : part.stop], self.features, scorers)
            for scorers in [self.scorers if asked else {}]
            for part in _parts(self.n)
        ]
        prompts, images = self.plan.spread if asked else (0, 0)
        varied = [self.features(to_images(test.variants(part, images))).float() for part in _parts(prompts)]
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return Samples(
            features=found["features"],
            spread=torch.cat(varied).reshape(prompts, images, -1) if varied else None,
            scores={key.removeprefix(SCORE): values for key, values in found.items() if key.startswith(SCORE)},
            hashes=None,
            evaluations=0.0,
        )

    def rows(self, cell: Cell, samples: Samples, **teacher: Any) -> list[Quality]:
        """A row for each of `sizes`; `teacher` as :meth:`.Measure.rows` takes it."""
        return self.measure.rows(cell, samples, self.sizes, **teacher)

    def identity(self) -> dict[str, Any]:
        """The part of the protocol that must be equal for distances to compare."""
        return {
            "features": described(self.features),
            "seeds": {"noise": self.plan.seed, "bootstrap": self.measure.seed},
            "reference": self.measure.reference.identity(),
            "diversity": list(self.plan.diversity),
            "resamples": self.measure.resamples,
        }

    def protocol(self) -> dict[str, Any]:
        """How the numbers are made, for the results file."""
        plan = self.plan.identity()
        return {
            **self.identity(),
            "prompts": {"source": self.plan.source, "count": self.n, "hash": plan["prompts"]},
            "sizes": list(self.sizes),
            "resolution": self.resolution,
            "real": self.real,
            "metrics": list(self.measure.optional),
            "scores": {key: scorer.name for key, scorer in self.scorers.items()},
        }


def _parts(count: int) -> list[range]:
    """Indices of images that are in memory at a time."""
    return [range(first, min(first + _PART, count)) for first in range(0, count, _PART)]


def demo_yardstick(
    judge: Judge, sizes: Sequence[int] = (N,), seed: int = 0, reference: Reference | None = None
) -> Yardstick:
    """The yardstick of the demo: captions of its test world, seen by its judge.

    Args:
        judge: classifier of the world.
        sizes: numbers of images that rows are made for: the first so many captions, one image each.
        seed: of the noise and the bootstrap.
        reference: real images' statistics; measured anew by default.

    Raises InputError for sizes below 2 or none.
    """
    if not sizes or min(sizes) < 2:
        raise InputError(f"expected at least 2 images a configuration, got {sizes}; raise the number of images")
    features = JudgeFeatures(judge)
    prompts = World(TEST_SEED, judge.resolution).captions(range(max(sizes)))
    found = reference or Reference.measure(features, WorldImages(), judge.resolution)
    return Yardstick(
        Plan(tuple(prompts), SOURCE, seed, DIVERSITY),
        features,
        {ACCURACY: JudgeAccuracy(judge)},
        Measure(found, seed, resamples=RESAMPLES),
        sizes,
        judge.resolution,
    )
