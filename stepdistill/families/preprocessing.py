"""From images to what a vision checkpoint was trained on: its own resize, crop and normalisation, by Pillow.

Pillow's filters are antialiased, so a large image doesn't turn into noise when it is made small (arXiv 2104.11222); a network
fed by another resize gives other features of the same images. The settings are those of the checkpoint's
preprocessor_config.json. They are applied here, not by transformers' image processors, whose default needs torchvision and
resizes differently with and without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import InputError

Images = NDArray[np.uint8]
"""[N, H, W, 3], 0-255."""
Size = tuple[int, int]  # height, width
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
# settings that change what a network sees, and image processors whose resize or crop is not what their settings say
OTHERS = ("rescale_offset", "offset", "include_top", "keep_aspect_ratio", "size_divisor", "crop_to_patches")
OWN_WAYS = ("Levit", "Perceiver")
CONVNEXT, SHARE = "ConvNext", 224 / 256  # its crop_pct where none is written
WARPED_FROM = 384  # ConvNeXt's crop_pct: at this size and above images are resized to a square, below they are cropped


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, scale and normalise, in this order; what is None is left out.

    Attributes:
        edge: the length of the shorter side after the resize, which keeps the aspect ratio.
        size: (height, width) after the resize, instead of `edge`.
        crop: (height, width) of the centre that is kept.
        scale: what levels 0-255 are multiplied by.
        mean, std: of each channel, after the scale.
        resample: Pillow's filter.
    """

    edge: int | None
    size: Size | None
    crop: Size | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling

    @classmethod
    def read(cls, settings: Mapping[str, Any], where: str, fix: str) -> Preprocessing:
        """From a preprocessor_config.json.

        A plain number as the `size` is the shorter side where a crop follows, and a square otherwise. Without a
        `rescale_factor` it is 1/255, and there is a crop where there is a `crop_size`.

        Args:
            where: the checkpoint, for the message.
            fix: what to do about it.

        Raises:
            InputError: size, filter, mean or std are missing or not understood, or there is a step that this class lacks.
        """
        try:
            return cls._parse(settings)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"expected image settings in the preprocessor_config.json of {where}, got {reason}; {fix}"
            ) from error

    @classmethod
    def _parse(cls, settings: Mapping[str, Any]) -> Preprocessing:
        _check_supported(settings)
        cropped = settings.get("do_center_crop", settings.get("crop_size") is not None)
        edge, size, crop = None, None, _size(settings["crop_size"]) if cropped else None
        share, resample = _share(settings), Image.Resampling.NEAREST  # which nothing is resized by
        if settings.get("do_resize", True):
            edge, size = _target(settings["size"], cropped or share is not None)
            resample = Image.Resampling(settings["resample"])
        if edge is not None and share is not None:
            edge, size, crop = (
                (int(edge / share), None, (edge, edge)) if edge < WARPED_FROM else (None, (edge, edge), crop)
            )
        scale = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        normal = settings.get("do_normalize", True)
        mean = _channels(settings["image_mean"] if normal else (0, 0, 0))
        std = _channels(settings["image_std"] if normal else (1, 1, 1))
        return cls(edge, size, crop, scale, mean, std, resample)

    @property
    def resizes(self) -> bool:
        """Whether images of any size come out as those of one."""
        return self.edge is not None or self.size is not None

    def identity(self) -> str:
        """All of it in one line, for a hash."""
        return json.dumps(asdict(self), sort_keys=True)

    def __call__(self, images: Images) -> Tensor:
        """[N, 3, h, w] float32 of uint8 images [N, H, W, 3], which the caller has checked."""
        sized = np.stack([self._sized(image) for image in images]).astype(np.float64)
        pixels = (sized * self.scale - np.array(self.mean)) / np.array(self.std)
        return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    def _sized(self, image: Images) -> Images:
        height, width = image.shape[:2]
        if self.edge is not None:
            short = min(height, width)
            height, width = self.edge * height // short, self.edge * width // short
        elif self.size is not None:
            height, width = self.size
        if (height, width) != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize((width, height), self.resample))
        if self.crop is None:
            return image
        if height < self.crop[0] or width < self.crop[1]:
            raise ValueError(f"expected images of {self.crop} or more to crop, got {(height, width)}; make larger ones")
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return image[top : top + self.crop[0], left : left + self.crop[1]]


def _kind(settings: Mapping[str, Any]) -> str:
    return str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")


def _check_supported(settings: Mapping[str, Any]) -> None:
    strange = [key for key, value in settings.items() if value and key.startswith("do_") and key not in STEPS]
    strange += [key for key in OTHERS if settings.get(key)]
    if settings.get("ensure_multiple_of") not in (None, 1):
        strange.append("ensure_multiple_of")
    if strange:
        raise ValueError(f"{', '.join(strange)}, which is not supported")
    if _kind(settings).startswith(OWN_WAYS):
        raise ValueError(f"those of a {_kind(settings)}, which is not supported")


def _share(settings: Mapping[str, Any]) -> float | None:
    """How much of the resized image's edge is kept, where the checkpoint says it so."""
    share = settings.get("crop_pct")
    return SHARE if share is None and _kind(settings).startswith(CONVNEXT) else share


def _size(value: Any) -> Size:
    """A number, [height, width] or {"height", "width"}."""
    if isinstance(value, Mapping):
        value = (value["height"], value["width"])
    height, width = (value, value) if isinstance(value, int) else value
    if min(int(height), int(width)) < 1:
        raise ValueError(f"the size {value}")
    return int(height), int(width)


def _target(value: Any, keeps_ratio: bool) -> tuple[int | None, Size | None]:
    """(edge, size) of a `size`, of which one is None."""
    given = {key: v for key, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    if given.keys() == {"shortest_edge"} or (isinstance(value, int) and keeps_ratio):
        return int(given.get("shortest_edge", value)), None
    if given and given.keys() != {"height", "width"}:
        raise ValueError(f"the size {given}; shortest_edge, or height and width, are supported")
    return None, _size(given or value)


def _channels(value: Any) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in value)
    if len(numbers) != 3:
        raise ValueError(f"a mean or std of {len(numbers)} channels instead of 3")
    return numbers
