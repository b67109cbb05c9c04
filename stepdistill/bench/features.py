"""What a picture is compared by: an extractor turns images into vectors and owns their dtype, range and size.

Images travel in ONE form in this package, as pipelines and PNG files hold them: uint8 NumPy arrays [N, H, W, 3]. An extractor
scales them itself, so that no caller can feed it [0, 1] where it wants [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..families.preprocessing import Images

if TYPE_CHECKING:
    from .judge import Judge


class FeatureExtractor(Protocol):
    """Images to vectors. Name and weights hash go into every results file: distances by other features don't compare."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def dim(self) -> int:
        """Length of a feature vector."""

    @property
    def weights_hash(self) -> str:
        """Tells it from one that gives other features: by other weights, or of images that are resized otherwise."""

    def __call__(self, images: Images) -> Tensor:
        """Features [N, dim] float64 on the CPU of uint8 images [N, H, W, 3]."""


def checked_images(images: Images) -> Images:
    """The images, if they are uint8 [N, H, W, 3] with N >= 1 that use their range.

    Raises ValueError otherwise, also for a batch of nothing but 0 and 1: floats in [0, 1] that were cast, not scaled.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = images.dtype if isinstance(images, np.ndarray | Tensor) else type(images).__name__
        raise ValueError(f"expected a NumPy array of uint8 images, got {found}; scale to 0-255, round and cast")
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"expected images [N, H, W, 3], got shape {images.shape}; move the channels last")
    if images.max() == 1:
        raise ValueError(
            "expected images in 0-255, got only 0 and 1: floats that were cast (scale them by 255 first), or all but black "
            "images; look at them"
        )
    return images


def to_levels(images: Images) -> Tensor:
    """uint8 [N, H, W, 3] to uint8 [N, 3, H, W], a copy: arrays that Pillow made are read-only, flipped ones run backwards."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def to_pixels(images: Images) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return to_levels(images).float().div(127.5).sub(1)


def to_images(pixels: Tensor) -> Images:
    """Pixels [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3], rounded as Diffusers does; what lies outside is clipped."""
    levels = pixels.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()


def hash_weights(module: nn.Module, about: str = "") -> str:
    """16 hex digits over all tensors of the state dict (names, dtypes, shapes and bytes), and what else there is to say."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(about.encode())
    return digest.hexdigest()[:16]


class JudgeFeatures:
    """The demo judge as an extractor: a classifier of the demo world's attributes, for images of its own size only.

    Args:
        judge: the classifier.
        batch_size: images a forward.
    """

    name = "demo judge"

    def __init__(self, judge: Judge, batch_size: int = 250) -> None:
        self._judge, self._batch_size = judge.eval(), batch_size
        self.weights_hash, self.dim = hash_weights(judge), judge.dim

    def _batches(self, images: Images) -> Iterator[Tensor]:
        images = checked_images(images)
        side, size = self._judge.resolution, f"{images.shape[1]}x{images.shape[2]}"
        if images.shape[1:3] != (side, side):
            raise InputError(
                f"expected {side}x{side} images for --features demo, got {size}; the demo's judge resizes nothing: give "
                "--features a vision model, or inception"
            )
        for start in range(0, len(images), self._batch_size):
            yield to_pixels(images[start : start + self._batch_size])

    @torch.inference_mode()
    def __call__(self, images: Images) -> Tensor:
        """Features [N, dim] float64 of uint8 images [N, R, R, 3], R the judge's resolution; InputError for another size."""
        return torch.cat([self._judge.features(pixels).double() for pixels in self._batches(images)])

    @torch.inference_mode()
    def logits(self, images: Images) -> dict[str, Tensor]:
        """Attribute -> logits [N, number of its values] of the same images."""
        parts = [self._judge(pixels) for pixels in self._batches(images)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
