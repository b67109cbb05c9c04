"""Differentiable augmentation (DiffAugment, arXiv 2006.10738): what a discriminator is shown is tinted, moved and cut.

Real and made pictures go through the same augmentation, and gradients through it to the made ones: the discriminator can't
learn the data by heart, and the student doesn't learn to draw what was done to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ..randomness import StepRandom

KINDS = ("colour", "translation", "cutout")
SHIFT, CUT = 1 / 8, 1 / 2  # of a side: the furthest move, and the square that is blanked


class Augmentation:
    """One draw for each sample of a batch: the same object augments real and made pictures alike.

    Args:
        kinds: of :data:`KINDS`, in any order; they are applied in that one.
        rng: the samples' randomness.

    Raises InputError for other kinds.
    """

    def __init__(self, kinds: Sequence[str], rng: StepRandom) -> None:
        check_kinds(kinds)
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.draws = {kind: rng.uniform(f"augmentation {kind}", (3 if kind == "colour" else 2,)) for kind in self.kinds}

    def __call__(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] of pixels in about [-1, 1]; differentiable. What is moved in or cut out is 0, a middle grey."""
        for kind in self.kinds:
            pixels = {"colour": tinted, "translation": moved, "cutout": cut}[kind](pixels, self.draws[kind])
        return pixels


def check_kinds(kinds: Sequence[str]) -> None:
    """InputError where one is unknown."""
    if odd := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(
            f"expected augmentations out of {', '.join(KINDS)}, got {odd[0]!r}; fix --method.augmentations (none: '')"
        )


def tinted(pixels: Tensor, u: Tensor) -> Tensor:
    """Brightness + U[-.5, .5), saturation * U[0, 2), contrast * U[.5, 1.5), with u [B, 3] in [0, 1) for the three."""
    brightness, saturation, contrast = u.to(pixels)[:, :, None, None, None].unbind(1)
    pixels = pixels + (brightness - 0.5)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + 2.0 * saturation * (pixels - grey)
    level = pixels.mean((1, 2, 3), keepdim=True)
    return level + (0.5 + contrast) * (pixels - level)


def moved(pixels: Tensor, u: Tensor) -> Tensor:
    """Each picture down and right by whole pixels, up to an eighth of its sides either way; u [B, 2] in [0, 1)."""
    sides = pixels.shape[-2:]
    reach = [int(side * SHIFT + 0.5) for side in sides]
    padded = functional.pad(pixels, (reach[1], reach[1], reach[0], reach[0]))
    corners = [[int(part * (2 * r + 1)) for part, r in zip(row, reach, strict=True)] for row in u.tolist()]
    # slices, not a gather, whose derivative adds in any order on accelerators
    return torch.stack(
        [one[:, y : y + sides[0], x : x + sides[1]] for one, (y, x) in zip(padded, corners, strict=True)]
    )


def cut(pixels: Tensor, u: Tensor) -> Tensor:
    """Each picture without a rectangle of half its sides, centred anywhere in it; u [B, 2] in [0, 1)."""
    inside = []
    for side, part in zip(pixels.shape[-2:], u.unbind(1), strict=True):
        size = int(side * CUT + 0.5)
        first = (part * (side + (1 - size % 2))).long() - size // 2
        where = torch.arange(side)
        inside.append((where >= first[:, None]) & (where < first[:, None] + size))
    rows, columns = inside
    kept = ~(rows[:, :, None] & columns[:, None, :])
    return pixels * kept[:, None].to(pixels)
