"""A small eye, a small decoder, and games of ADD with them."""

from __future__ import annotations

from typing import Any

import torch
from adversaries import Convolutional
from torch import Tensor, nn

from stepdistill.config import CommaList
from stepdistill.methods.add import ADD, ADDConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.image_features import ImageFeatures, blocks
from stepdistill.networks.lora import LoraSpec

COND = {"label": torch.zeros(1).long()}


class Sight(nn.Module):
    """Two blocks of convolutions on pictures."""

    def __init__(self, seed: int = 5, width: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = pixel_values
        for block in self.blocks:
            x = block(x).tanh()
        return {"last_hidden_state": x.flatten(2).transpose(1, 2)}


class Decoder(nn.Module):
    """Latents [1, h, w] -> pixels [3, 2 h, 2 w]; each latent makes its own four pixels."""

    def __init__(self, seed: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.up = nn.ConvTranspose2d(1, 3, 2, stride=2)
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.up(latents).tanh()
        return out


def sight(size: int = 8, seed: int = 5) -> ImageFeatures:
    net = Sight(seed)
    return ImageFeatures(net, blocks(net), (size, size))


def add_config(**options: Any) -> ADDConfig:
    """Four times, each as likely, small heads."""
    lists = ("times", "probabilities", "warmup_probabilities", "augmentations", "taps")
    given = {name: CommaList.parse(value) if name in lists else value for name, value in options.items()}
    return ADDConfig(**{"head_width": 8, "guard_every": 3, **given})


def show(kind: str = "full", teacher: Denoiser | None = None, seed: int = 0, **options: Any) -> ADD:
    """A small game with prompts, on decoded pictures: a student that starts as its teacher."""
    teacher = teacher or Convolutional()
    student = (
        teacher.full_student() if kind == "full" else teacher.with_lora(LoraSpec(2, 2.0, tuple(teacher.lora_targets)))
    )
    return ADD(add_config(**options), student, teacher, sight(), Decoder(), (1, 4, 4), COND, seed)
