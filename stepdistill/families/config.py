"""Which checkpoints to open. Imports nothing, so that recipes can read it first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TeacherConfig:
    """Which checkpoint to distil.

    Attributes:
        path: a Diffusers folder, a hub id, a single-file checkpoint, or "demo" for the small teacher that ships.
        revision: branch, tag or commit on the hub.
        variant: file variant, e.g. fp16.
        vae: another autoencoder's folder or hub id, e.g. madebyollin/sdxl-vae-fp16-fix.
        config: for a single file, a Diffusers folder or hub id with the configs of its parts; from the hub by default.
    """

    path: str = "demo"
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    config: str | None = None


@dataclass
class EyeConfig:
    """Which vision model a discriminator of pictures looks through.

    Attributes:
        path: a folder or hub id (org/name, org/name@revision) of a vision transformer with its image settings, or "demo" for
            the small one that ships.
        size: pixels a side that pictures are resized to for it; the checkpoint's own by default.
    """

    path: str = "facebook/dinov2-small"
    size: int | None = None
