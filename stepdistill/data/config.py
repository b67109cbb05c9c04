"""The options of the data section."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError


@dataclass
class DataConfig:
    """What to train on, and where its latents are cached.

    Attributes:
        path: "demo" (images drawn by code), a folder of images or of .tar shards, shards as "shards/{000..003}.tar", a data
            set of the `datasets` library (hub id, folder or file of parquet, arrow, json or csv, `save_to_disk` output), or
            a .txt file of prompts, for which the teacher makes the latents.
        split: which split of a `datasets` data set.
        image_column: its column of images: encoded bytes, or paths.
        caption_column: column (or field of the shards' .json) that holds the captions ("caption" is also tried); "none"
            leaves all captions empty, for unconditional models.
        resolution: side of the square images in pixels; the model's own by default.
        center_crop: cut squares from the centre; with false from anywhere.
        random_flip: mirror half of the images.
        variants: crops and flips that are cached of each image; each step draws one of them.
        max_bad_fraction: unreadable images are left out up to this share of all.
        guidance_scale: of the latents that the teacher makes from prompts; 1 is no guidance.
        num_inference_steps: of the same, DDIM.
        demo_images: how many images path "demo" has.
        encode_batch_size: images or prompts encoded, or latents made, at once while the cache is filled.
        cache_dir: where caches go; by default $STEPDISTILL_CACHE, $XDG_CACHE_HOME/stepdistill or ~/.cache/stepdistill.
    """

    path: str = "demo"
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    variants: int = 1
    max_bad_fraction: float = 0.01
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    demo_images: int = 4096
    encode_batch_size: int = 16
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise InputError(
                f"expected a positive multiple of 8 pixels, got resolution {self.resolution}; fix --data.resolution"
            )
        for name in ("variants", "num_inference_steps", "demo_images", "encode_batch_size"):
            if (value := vars(self)[name]) < 1:
                raise InputError(f"expected {name} >= 1, got {value}; fix --data.{name}")
        for name in ("path", "split", "image_column", "caption_column"):
            if not vars(self)[name]:
                raise InputError(f"expected a name, got an empty {name}; fix --data.{name}")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise InputError(
                f"expected a share in [0, 1), got max_bad_fraction {self.max_bad_fraction}; fix --data.max_bad_fraction"
            )
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise InputError(
                f"expected a guidance scale >= 0 (1 is none), got {self.guidance_scale}; fix --data.guidance_scale"
            )
        different = (2 if self.random_flip else 1) if self.center_crop else self.variants
        if self.variants > different:
            raise InputError(
                f"expected at most {different} variants of a centred crop {'with' if self.random_flip else 'without'} flips, "
                f"got {self.variants}, which would be the same again; fix --data.variants, --data.center_crop or "
                "--data.random_flip"
            )

    def cache_folder(self) -> Path:
        """`cache_dir`, or the place that the environment names."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.cache_dir or os.environ.get("STEPDISTILL_CACHE") or f"{home}/stepdistill").expanduser()
