"""Opening a vision model of transformers as the eye of a discriminator of pictures."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..errors import InputError
from ..networks.image_features import ImageFeatures, Size, blocks, evenly
from .config import EyeConfig
from .loading import DEMO_EYE
from .preprocessing import Preprocessing
from .towers import Tower


def open_eye(config: EyeConfig, taps: Sequence[str] | None = None) -> ImageFeatures:
    """The vision model at `config.path`, frozen, in float32, with its own size, mean and std.

    ViT, DINO, DINOv2 (with registers or without), DINOv3, the vision part of CLIP or SigLIP, and others whose blocks give one
    token a patch or maps. Pictures are resized as a whole; a checkpoint's own crop says only to what size.

    Args:
        config: path or hub id, size.
        taps: names of its modules that are read; four of its blocks, evenly spaced, by default.

    Raises:
        InputError: no such checkpoint, no vision model, weights or image settings missing, a size that it doesn't take, unknown
            taps or ones without a place for each patch, or a model that draws random numbers (masked autoencoders).
    """
    tower = Tower.find(str(DEMO_EYE) if config.path == "demo" else config.path, "--eye.path")
    described = tower.config()
    settings = Preprocessing.read(tower.image_settings(), str(tower), tower.fix)
    net = tower.vision_model(described)
    facts = net.config.to_dict()
    own = _square(facts.get("image_size"))
    size = (
        (config.size, config.size) if config.size else settings.crop or settings.size or _square(settings.edge) or own
    )
    if size is None:
        raise InputError(
            f"expected the size of the pictures that {tower} takes, got none in its settings; give --eye.size"
        )
    scale = 255.0 * settings.scale  # from levels to pixels in [0, 1]
    patch = _square(facts.get("patch_size"))
    names = evenly(blocks(net)) if taps is None else taps
    eye = ImageFeatures(
        net,
        names,
        size,
        [m / scale for m in settings.mean],
        [s / scale for s in settings.std],
        patch[0] if patch else 1,
        1 + int(facts.get("num_register_tokens") or 0),
        settings.resample is Image.Resampling.BILINEAR,
        _options(net, size, own),
    )
    _probe(eye, tower)
    return eye


def _square(side: Any) -> Size | None:
    """(height, width) of a number or a pair; None for anything else."""
    if isinstance(side, int):
        return side, side
    return (int(side[0]), int(side[1])) if isinstance(side, list | tuple) and len(side) == 2 else None


def _options(net: Any, size: Size, own: Size | None) -> dict[str, Any]:
    """What a call needs at another size than the checkpoint's, where the model doesn't adapt by itself."""
    takes = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and own is not None and size != own else {}


@torch.no_grad()
def _probe(eye: ImageFeatures, tower: Tower) -> None:
    """InputError where the network doesn't take pictures of this size, or sees the same picture differently."""
    picture = torch.linspace(-1, 1, 3 * eye.size[0] * eye.size[1]).reshape(1, 3, *eye.size)
    with tower.explained(f"a vision model that takes pictures of {eye.size[0]}x{eye.size[1]} (--eye.size)"):
        first, second = eye(picture), eye(picture)
    if not all(torch.equal(*pair) for pair in zip(first, second, strict=True)):
        raise InputError(
            f"expected the same features of the same picture from {tower}, got others at each call (masked autoencoders hide a "
            f"random part); {tower.fix}"
        )
