"""The demo's eye: a small vision transformer that a discriminator of pictures looks through, as DINOv2 is for real models.

It is taught by masked image modelling (SimMIM, arXiv 2111.09886): a part of a picture's patches is hidden, and the network says
what is there. It has another architecture, task, seed and world than the judge, which must not measure what was trained on it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..batch import Batch
from ..errors import InputError
from ..method import Losses, Method
from ..networks.augmentation import Augmentation
from ..networks.network import Module, Network

if TYPE_CHECKING:
    from transformers import Dinov2Model

SIDE, PATCH, WIDTH = 64, 8, 96
SETTINGS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def eye() -> Dinov2Model:
    """0.47 M parameters: DINOv2's layout, 4 blocks of width 96 on 8x8 patches of 8x8 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=4
    )
    return Dinov2Model(config)


class Masked(nn.Module):
    """The eye with one linear layer that draws hidden patches from their tokens and the class token.

    Reading the class token too makes it say what the whole picture has in common.
    """

    def __init__(self, backbone: Dinov2Model) -> None:
        super().__init__()
        self.backbone = backbone
        self.draw = nn.Linear(2 * WIDTH, 3 * PATCH**2)

    def forward(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """What all patches show, [B, N, 3 P^2], seen without those of `hidden` [B, N]."""
        tokens = self.backbone(pixel_values=pixels, bool_masked_pos=hidden).last_hidden_state
        whole, patches = tokens[:, :1], tokens[:, 1:]
        found: Tensor = self.draw(torch.cat([patches, whole.expand_as(patches)], 2))
        return found


@dataclass
class MaskingConfig:
    """Share of a picture's patches that is hidden, and what is done to it before (see `networks/augmentation.py`)."""

    hidden: float = 0.6
    augmentations: tuple[str, ...] = ("colour", "translation")

    def __post_init__(self) -> None:
        if not 0 < self.hidden < 1:
            raise InputError(f"expected a share of hidden patches in (0, 1), got {self.hidden}; 0.6 is usual")


class Masking(Method):
    """L1 between hidden patches and what the network draws in their place (arXiv 2111.09886, section 3.2)."""

    def __init__(self, config: MaskingConfig, backbone: Dinov2Model) -> None:
        self.config, self.student = config, Module(Masked(backbone))

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def hidden(self, batch: Batch) -> Tensor:
        """[B, N] bool: as many patches of every picture."""
        u = batch.rng.uniform("hidden", ((SIDE // PATCH) ** 2,))
        return (u.argsort(1).argsort(1) < round(self.config.hidden * u.shape[1])).to(batch.data().device)

    def training_step(self, batch: Batch) -> Losses:
        pixels = Augmentation(self.config.augmentations, batch.rng)(batch.data())
        hidden = self.hidden(batch)
        error = (self.student(pixels, hidden).float() - patches(pixels)).abs().mean(2)
        return Losses({"masked": (error * hidden).sum(1).div(hidden.sum(1)).mean()}, count=float(len(batch)))


def patches(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3 P^2], in rows."""
    return functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


@torch.no_grad()
def hidden_error(method: Masking, batch: Batch) -> float:
    """The mean L1 error of hidden patches, of pixels in [-1, 1]."""
    return float(method.training_step(batch).total)


def save(folder: str | os.PathLike[str], backbone: Dinov2Model) -> None:
    """Writes it as `save_pretrained` does, in fp16 (it is cast in place), with the settings of its image processor."""
    path = Path(folder)
    backbone.half().config._name_or_path = ""
    backbone.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n", encoding="utf-8")
