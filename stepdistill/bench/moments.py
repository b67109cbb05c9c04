"""Mean and covariance of features that come in parts, from batches, files and processes, and what joins such parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .metrics import checked_features, frechet_from, warn_if_few

_SAME = 1e-5  # of a row's norm, within which two features are those of one image, read in different batches


class Moments:
    """Count, mean and scatter matrix of feature vectors, in float64; the features themselves are not kept.

    Parts are centred on their own means and then joined (Chan, Golub and LeVeque 1979), and means are kept as distances from
    the first row. So features far from 0 lose no digits, wherever the first of them lie. Memory is that of one d x d matrix and
    of one part.

    Args:
        dim: d, the length of a feature vector.

    Raises ValueError for dim < 1.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"expected a dimension >= 1, got {dim}; take the extractor's")
        self.count = 0
        self._origin = torch.zeros(dim, dtype=torch.float64)
        self._offset = torch.zeros(dim, dtype=torch.float64)  # of the mean from the origin
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self._origin)

    def update(self, features: Tensor) -> None:
        """Takes in features [B, d] of any float type, B >= 1; ValueError for another shape, nan or inf."""
        (rows,) = checked_features(features, least=1)
        self._check(rows.shape[1])
        if not self.count:
            self._origin = rows[0].clone()
        rows = rows - self._origin
        offset = rows.mean(0)
        rows -= offset
        self._scatter.addmm_(rows.T, rows)
        self._join(len(rows), offset - self._offset)

    def merge(self, other: Moments) -> None:
        """Takes in what another process or file has counted, which stays as it is; ValueError for another d.

        Images that both have seen count twice: see :func:`merged_by_index`.
        """
        self._check(other.dim)
        if not self.count:
            self._origin = other._origin.clone()
        self._scatter += other._scatter
        self._join(other.count, self._apart(other))

    def _apart(self, other: Moments) -> Tensor:
        """[d] how far the other's mean lies from this one."""
        return (other._origin - self._origin) + (other._offset - self._offset)

    def _join(self, count: int, apart: Tensor) -> None:
        """What is left after scatters about two means are added: the part between the means, and the common mean."""
        if count:
            total = self.count + count
            self._scatter.addr_(apart, apart, alpha=self.count * count / total)
            self._offset += apart * (count / total)
            self.count = total

    def _check(self, dim: int) -> None:
        if dim != self.dim:
            raise ValueError(
                f"expected features of one dimension, got {[self.dim, dim]}; use one extractor for all sets"
            )

    def _need(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"expected at least {least} images, got {self.count}; raise the number of images")

    @property
    def mean(self) -> Tensor:
        """[d]; ValueError without an image."""
        self._need(1)
        return self._origin + self._offset

    @property
    def cov(self) -> Tensor:
        """[d, d], unbiased; ValueError for fewer than 2 images."""
        self._need(2)
        return self._scatter / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a safetensors file or another process needs: count [] int64, mean [d], scatter [d, d]."""
        mean = self._origin + self._offset
        return {"count": torch.tensor(self.count), "mean": mean, "scatter": self._scatter.clone()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """What `tensors` gave; ValueError for others."""
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        dim = next(iter(shapes.get("mean", ())), 0)
        if shapes != {"count": (), "mean": (dim,), "scatter": (dim, dim)}:
            raise ValueError(f"expected count [], mean [d] and scatter [d, d], got {shapes}; write the moments again")
        if tensors["count"] < 0 or not all(torch.isfinite(value).all() for value in tensors.values()):
            raise ValueError("expected a count >= 0 and finite moments, got others; write the moments again")
        found = cls(dim)
        found.count = int(tensors["count"])
        found._origin.copy_(tensors["mean"])
        found._scatter.copy_(tensors["scatter"])
        return found


def frechet_between(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of two sets by their moments, as `metrics.frechet_distance` of their features.

    Warns, once, below 10 images per dimension. Raises ValueError for fewer than 2 images or unequal d.
    """
    a._check(b.dim)
    apart = a._apart(b)
    distance = frechet_from(torch.zeros_like(apart), a.cov)(apart, b.cov)
    warn_if_few(min(a.count, b.count), a.dim)
    return distance


def merged_by_index(parts: Sequence[tuple[Sequence[int] | Tensor, Tensor]], n: int) -> Tensor:
    """Features [n, d] in the order of their prompts, each once, from parts that processes made in any order.

    A padded sampler hands some prompts out twice. Of copies that are equal, to the rounding of other batches, the first stays.

    Args:
        parts: (indices [B] in [0, n), features [B, d]) each. A part may be empty.
        n: number of prompts.

    Raises:
        InputError: a prompt without features, or with features that differ; an index outside of [0, n).
        ValueError: no parts, lengths that differ, unequal d, nan or inf.
    """
    if n < 1 or not parts:
        raise ValueError(f"expected n >= 1 and parts, got n = {n} and {len(parts)} parts")
    given = [torch.as_tensor(indices, dtype=torch.int64, device="cpu").reshape(-1) for indices, _ in parts]
    sets = checked_features(*(features for _, features in parts), least=0)
    if (lengths := [len(i) for i in given]) != [len(s) for s in sets]:
        raise ValueError(f"expected an index for each row, got {lengths} and {[len(s) for s in sets]}")
    indices, order = torch.cat(given).sort(stable=True)
    if len(indices) and (indices[0] < 0 or indices[-1] >= n):
        raise InputError(
            f"expected indices of {n} prompts, got {int(indices[0])} to {int(indices[-1])}; "
            "empty the output folder, it holds images of another run"
        )
    rows, counts = torch.cat(sets)[order], indices.bincount(minlength=n)
    if not counts.all():
        missing = (counts == 0).nonzero().flatten().tolist()
        raise InputError(
            f"expected features of {n} prompts, got none of {len(missing)}, the first of which is number {missing[0]}; "
            "run the sweep again, it makes what is missing"
        )
    kept = rows[counts.cumsum(0) - counts]
    apart = (rows - kept[indices]).norm(dim=1) > _SAME * kept[indices].norm(dim=1)
    if apart.any():
        raise InputError(
            f"expected one image a prompt, got different ones of number {int(indices[apart][0])}; "
            "empty the output folder, it holds images of another run"
        )
    return kept
