"""From features and scores to the numbers of a row, with intervals: the one place where a cell's quality is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .features import Images
from .infinity import frechet_infinity
from .kernels import cmmd, kid
from .manifold import coverage, diversity, recall
from .metrics import bootstrap_draws, frechet_to, interval_of, warn_if_few
from .paired import feature_distances, pixel_distances
from .quantities import OPTIONAL
from .reference import Reference
from .rows import FD, Cell, Quality, Value
from .samples import Samples

RESAMPLES = 300  # of a bootstrap
NEIGHBOUR, COVERED = 3, 5  # whose distance is the radius, for recall and for coverage

FEATURES, RMS = "features_to_teacher", "rms_to_teacher"


@dataclass(frozen=True)
class _Distance:
    """A Frechet distance with its draws, which pair with those of another set of as many images."""

    value: float
    draws: NDArray[np.float64]

    def spelled(self) -> Value:
        """With the interval of a biased statistic: its mean is put where the value is."""
        return Value(self.value, interval_of(self.draws, self.value))

    def less(self, other: _Distance) -> Value:
        """The difference; both have drawn the same prompts, so what they have in common cancels."""
        return _Distance(self.value - other.value, self.draws - other.draws).spelled()


class Measure:
    """Turns samples into values.

    Args:
        reference: real images.
        seed: of the bootstrap and of the subsets.
        optional: further quantities, out of `quantities.OPTIONAL`.
        resamples: of each bootstrap.
    """

    def __init__(
        self, reference: Reference, seed: int = 0, optional: Sequence[str] = (), resamples: int = RESAMPLES
    ) -> None:
        if unknown := set(optional) - set(OPTIONAL):
            raise InputError(f"expected --metrics out of {','.join(OPTIONAL)}, got {','.join(sorted(unknown))}; fix it")
        if "coverage" in optional and (count := len(reference.features)) <= COVERED:
            raise InputError(
                f"expected {COVERED + 1} real images or more for --metrics coverage, got {count}; give more --data"
            )
        self.reference, self.seed, self.optional, self.resamples = reference, seed, tuple(optional), resamples
        self._distance = frechet_to(reference.mean, reference.cov)
        self._real = reference.features.double()
        self._known: dict[tuple[int, int], tuple[Samples, _Distance]] = {}

    def rows(
        self,
        cell: Cell,
        samples: Samples,
        sizes: Sequence[int],
        teacher: Samples | None = None,
        images: tuple[Images, Images] | None = None,
    ) -> list[Quality]:
        """A row for each number of images.

        Args:
            cell: what made the samples.
            samples: N of them.
            sizes: numbers of images, the first of the N; 2 or more.
            teacher: samples of the teacher as it is meant, of the same prompts and noise; None where the cell is that.
            images: the first images of the cell and of the teacher, for differences of pixels.
        """
        return [self._row(cell, samples, n, teacher, images) for n in sizes]

    def _row(
        self, cell: Cell, samples: Samples, n: int, teacher: Samples | None, images: tuple[Images, Images] | None
    ) -> Quality:
        own, against = self._frechet(samples, n), None
        values = self._values(samples, n, own)
        if teacher is not None:
            against = own.less(self._frechet(teacher, n))
            values |= {
                key: self._mean(per_image) for key, per_image in self._pairs(samples, n, teacher, images).items()
            }
        return Quality(cell, n, samples.evaluations, values, against)

    def values(self, samples: Samples, n: int) -> dict[str, Value]:
        """What the first n images score by themselves, by the key of the quantity."""
        return self._values(samples, n, self._frechet(samples, n))

    def _values(self, samples: Samples, n: int, distance: _Distance) -> dict[str, Value]:
        some = samples.features[:n].double()
        found = {FD: distance.spelled(), "kid": Value(kid(some, self._real))}
        if n > NEIGHBOUR:
            found["recall"] = Value(recall(some, self._real, NEIGHBOUR))
        if samples.spread is not None:
            found["diversity"] = Value(diversity(samples.spread.double()))
        for key in self.optional:
            found[key] = self._optional()[key](some)
        for key, scores in samples.scores.items():
            whole = "/" not in key
            found[key] = self._mean(scores[:n]) if whole else Value(float(scores[:n].mean()))
        return found

    def _optional(self) -> dict[str, Callable[[Tensor], Value]]:
        return {
            "fd_infinity": lambda some: Value(frechet_infinity(self._distance, some, self.seed).value),
            "cmmd": lambda some: Value(cmmd(some, self._real)),
            "coverage": lambda some: Value(coverage(some, self._real, COVERED)),
        }

    def _frechet(self, samples: Samples, n: int) -> _Distance:
        """Computed once: the teacher's is needed for every student."""
        if (id(samples), n) not in self._known:  # samples are kept, so that no other ones get their id
            self._known[id(samples), n] = samples, self._drawn(samples, n)
        return self._known[id(samples), n][1]

    def _drawn(self, samples: Samples, n: int) -> _Distance:
        some = samples.features[:n].double()
        if len(some) < n or not torch.isfinite(some).all():
            raise ValueError(f"expected {n} images with finite features, got {len(some)}; look at the images")
        warn_if_few(min(n, self.reference.count), some.shape[1])
        draws = bootstrap_draws(self._distance, some, n=self.resamples, seed=self.seed, paired=True)
        return _Distance(self._distance(some), draws)

    def _mean(self, values: Tensor) -> Value:
        values = values.double()
        draws = bootstrap_draws(lambda v: float(v.mean()), values, n=self.resamples, seed=self.seed, paired=True)
        return Value(float(values.mean()), interval_of(draws))

    def _pairs(
        self, samples: Samples, n: int, teacher: Samples, images: tuple[Images, Images] | None
    ) -> dict[str, Tensor]:
        found = {FEATURES: feature_distances(samples.features[:n], teacher.features[:n])}
        if images is not None and len(images[0]):
            found[RMS] = pixel_distances(images[0][:n], images[1][:n])
        return found

    def per_image(
        self, samples: Samples, teacher: Samples | None = None, images: tuple[Images, Images] | None = None
    ) -> dict[str, list[float]]:
        """One number an image, 6 digits of it, by the key of the quantity: scores, and distances to the teacher's image."""
        whole = {key: scores for key, scores in samples.scores.items() if "/" not in key}
        if teacher is not None:
            whole |= self._pairs(samples, len(samples.features), teacher, images)
        return {key: [float(f"{value:.6g}") for value in values.tolist()] for key, values in whole.items()}

    def real(self, samples: Samples | None, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
        """What real images score, for `protocol["real"]`; sizes of which there are not enough are left out."""
        if samples is None:
            return {}
        enough = [n for n in sizes if n <= len(samples.features)]
        return {str(n): {key: _plain(value) for key, value in self.values(samples, n).items()} for n in enough}


def _plain(value: Value) -> dict[str, Any]:
    return {"value": value.value, "interval": None if value.interval is None else list(value.interval)}
