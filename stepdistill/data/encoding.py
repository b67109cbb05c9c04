"""Makers of a cache's shards: images through the autoencoder, captions through the text encoder."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..families.model import Model
from .config import DataConfig
from .filling import Made, Maker
from .images import ImageSource
from .pictures import Picture, Unreadable, views
from .prompts import embed_prompts

R = TypeVar("R")
SHARD = 256  # images or prompts a file


class ImageLatents(Maker):
    """The posterior's mean and standard deviation of every view of every readable image; each step draws its own sample.

    Args:
        model: whose autoencoder is used.
        source: the images.
        resolution: side of the squares in pixels.
        prompt_rows: for each image the row of its caption.
        config: views, batch size, and how many images may be unreadable.
        seed: of the views.
    """

    kind, what, shard = "latents", "images", SHARD

    def __init__(
        self, model: Model, source: ImageSource, resolution: int, prompt_rows: Sequence[int], config: DataConfig,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.source, self.resolution, self.prompt_rows = model, source, resolution, prompt_rows
        self.config, self.seed, self.items = config, seed, len(source)
        self.bad: list[str] = []

    def make(self, items: range) -> Made:
        batch = max(1, self.config.encode_batch_size // self.config.variants)
        batches = [items[i : i + batch] for i in range(0, len(items), batch)]
        parts: list[dict[str, Tensor]] = []
        bad: list[str] = []
        # Pillow decodes and resizes outside the interpreter's lock
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for chosen, found in _ahead(pool, self._pictures, batches):
                good: list[tuple[int, Picture]] = []
                for index, pictures in zip(chosen, found, strict=True):
                    if isinstance(pictures, str):
                        bad.append(f"{self.source.name(index)} ({pictures})")
                        check_bad([*self.bad, *bad], self.items, self.config.max_bad_fraction)
                    else:
                        good += [(index, picture) for picture in pictures]
                size = self.config.encode_batch_size
                parts += [self._encoded(good[i : i + size]) for i in range(0, len(good), size)]
        tensors = stacked(parts)
        return Made(tensors, len(tensors["mean"]) if tensors else 0, bad)

    def _pictures(self, index: int) -> list[Picture] | str:
        """The views of an image, or why it cannot be read."""
        config = self.config
        wanted = views(self.seed, index, config.variants, config.center_crop, config.random_flip)
        try:
            return self.source.pictures(index, self.resolution, wanted)
        except Unreadable as error:
            return str(error)

    @torch.no_grad()
    def _encoded(self, rows: Sequence[tuple[int, Picture]]) -> dict[str, Tensor]:
        indices, pictures = zip(*rows, strict=True)
        mean, std = self.model.posterior(torch.stack([picture.pixels for picture in pictures]))
        check_finite([self.source.name(i) for i in indices], mean, std)
        return {
            "mean": mean.float().cpu(),
            "std": std.float().cpu(),
            "original": torch.tensor([picture.original for picture in pictures]),
            "crop": torch.tensor([picture.crop for picture in pictures]),
            "prompt": torch.tensor([self.prompt_rows[i] for i in indices]),
        }


class PromptEmbeds(Maker):
    """The text conditions of prompts; no tensors at all for models without a text encoder."""

    kind, what, shard = "prompts", "captions", SHARD

    def __init__(self, model: Model, texts: Sequence[str], batch_size: int) -> None:
        self.model, self.texts, self.batch_size, self.items = model, texts, batch_size, len(texts)
        self.bad: list[str] = []

    def make(self, items: range) -> Made:
        texts = self.texts[items.start : items.stop]
        return Made(embed_prompts(self.model, texts, self.batch_size), len(texts))


def stacked(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts' tensors, one after the other; {} of nothing."""
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]} if parts else {}


def check_bad(bad: Sequence[str], images: int, max_bad_fraction: float) -> None:
    """InputError with the first of them where more than this share of all images cannot be read."""
    allowed = math.floor(max_bad_fraction * images + 1e-9)  # 0.29 * 100 is a little below 29
    if len(bad) > allowed:
        raise InputError(
            f"expected at most {allowed} unreadable images of {images} (--data.max_bad_fraction {max_bad_fraction:g}), got "
            f"{'all' if len(bad) == images else 'at least'} {len(bad)}: {listed(bad)}; repair or delete them, or allow more"
        )


def listed(bad: Sequence[str]) -> str:
    """The first five."""
    return ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")


def check_finite(names: Sequence[str], *latents: Tensor) -> None:
    """InputError with the first name whose latents, [B, ...] each, are not finite."""
    good = torch.stack([torch.isfinite(values).flatten(1).all(1) for values in latents]).all(0)
    if not bool(good.all()):
        name = names[int((~good).nonzero()[0])]
        raise InputError(
            f"expected finite latents, got NaN or infinity for {name!r}; if every image does it, the autoencoder overflows "
            "in half precision: give --teacher.vae one that does not, e.g. madebyollin/sdxl-vae-fp16-fix"
        )


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[int], R], batches: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[R]]]:
    """Each batch with its results; while one is used, the next is computed."""
    waiting: deque[tuple[Sequence[int], list[Future[R]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(function, item) for item in batch]))
        if len(waiting) == 2:
            chosen, futures = waiting.popleft()
            yield chosen, [future.result() for future in futures]
    for chosen, futures in waiting:
        yield chosen, [future.result() for future in futures]
