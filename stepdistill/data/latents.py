"""Images as the autoencoder's posterior and captions as embeddings, computed once and kept on disk.

The posterior's mean and standard deviation are stored, not a sample of it: each step draws its own. For prompts alone it is the
teacher's latent, and no deviation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..batch import Batch, move
from ..errors import InputError
from ..families.model import Model
from ..randomness import StepRandom
from .cache import Entry, ShardStore
from .config import DataConfig
from .encoding import ImageLatents, PromptEmbeds, check_bad, listed
from .filling import Maker, fill
from .generating import TeacherLatents
from .images import ImageSource, Source
from .prompts import unique

FORMAT = 2  # to be raised whenever the same image or caption would give other tensors, or they lie elsewhere
log = logging.getLogger(__name__)


class CachedLatents:
    """The data set of a finished cache; rows are read from the memory-mapped shards when they are asked for.

    Args:
        store: a cache made by :func:`cache_latents`.
        model: gives the "no prompt" condition and, where a family has them, the size conditions.
        resolution: side of the images in pixels.
        rows: of each shard how many rows it has, by kind.
        variants: rows an image.
    """

    def __init__(
        self, store: ShardStore, model: Model, resolution: int, rows: Mapping[str, Sequence[int]], variants: int = 1
    ) -> None:
        self.store, self.model, self.resolution, self.variants = store, model, resolution, variants
        self._starts = {kind: [0, *accumulate(counts)] for kind, counts in rows.items()}
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._starts["latents"][-1] // self.variants

    def _place(self, kind: str, row: int) -> tuple[Any, int]:
        """The open shard that holds a row, and the row's place in it."""
        number = (
            bisect_right(self._starts[kind], row) - 1
        )  # of empty shards, which start where the next one does, the last
        name = f"{kind}-{number:05d}"
        if name not in self._open:
            self._open[name] = safe_open(self.store.path(name), framework="pt")
        return self._open[name], row - self._starts[kind][number]

    def rows(self, kind: str, rows: Sequence[int]) -> dict[str, Tensor]:
        """The stored tensors of rows of "latents" or "prompts", [len(rows), ...] each.

        Variant v of image i is row i * variants + v of "latents".
        """
        places = [self._place(kind, row) for row in rows]
        found = [{key: file.get_slice(key)[place] for key in file.keys()} for file, place in places]  # noqa: SIM118
        return {key: torch.stack([row[key] for row in found]) for key in found[0]}

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """x0 = mean + std * n with n ~ N(0, 1) of the stream "posterior", and the conditions of each image's caption.

        The stream "variant" chooses among an image's crops and flips.
        """
        if any(not 0 <= i < len(self) for i in indices):
            raise IndexError(f"expected indices in [0, {len(self)}), got {list(indices)}")
        variants = rng.integers("variant", 0, self.variants).tolist() if self.variants > 1 else [0] * len(indices)
        images = self.rows("latents", [i * self.variants + v for i, v in zip(indices, variants, strict=True)])
        x0 = images["mean"]
        if "std" in images:
            x0 = x0 + images["std"] * rng.to("cpu").normal("posterior", x0.shape[1:])
        target = [(self.resolution, self.resolution)] * len(indices)
        size = self.model.size_cond(_pairs(images["original"]), _pairs(images["crop"]), target)
        cond = {**self.rows("prompts", images["prompt"].tolist()), **move(size, "cpu")}
        return Batch(x0, cond, move(self.model.uncond(cond), "cpu"), rng)


def cache_latents(
    model: Model,
    source: Source,
    config: DataConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] | None = None,
    progress: bool = True,
) -> CachedLatents:
    """Encodes all images and captions into a subfolder of the cache folder, or takes up what an earlier run left there.

    The subfolder's name is a hash of everything that decides the latents. Only missing or damaged shards are made, with the
    model where it is. Every process calls this; each makes its share of the shards.

    Args:
        model: whose autoencoder and text encoder are used; for prompts alone its denoiser, too.
        source: what :func:`.open.open_source` gave.
        config: resolution, crops, guidance, batch size, and the folder; with several nodes, on a file system that they share.
        seed: of random crops and flips, and of the noise that the teacher's latents start from.
        rank, world: this process's number, and how many there are.
        wait: a barrier over all processes; needed where there are several.
        progress: show how far it is (on rank 0).

    Raises InputError for a resolution that the model cannot have, too many unreadable images, latents that are not finite,
    a full disk, and a folder that cannot be written.
    """
    if wait is None and world > 1:
        raise ValueError("expected a barrier, got wait=None with several processes")
    resolution = config.resolution or model.resolution
    shape = latent_shape(model, resolution)
    texts, rows = unique(source.captions)
    latents: Maker
    about: dict[str, Any]
    if isinstance(source, ImageSource):
        latents = ImageLatents(model, source, resolution, rows, config, seed)
        views = [config.variants, config.center_crop, config.random_flip]
        about = {"views": [*views, seed if config.random_flip or not config.center_crop else None]}
    else:
        scale, steps = config.guidance_scale, config.num_inference_steps
        latents = TeacherLatents(
            model, source.captions, resolution, shape, rows, scale, steps, config.encode_batch_size, seed
        )
        moved = [] if model.shift(shape) == 1.0 else [model.shift(shape)]
        about = {"teacher": [model.denoiser_fingerprint(), scale, steps, seed, *moved]}
    prompts = PromptEmbeds(model, texts, config.encode_batch_size)
    about |= {"format": FORMAT, "shards": [latents.shard, prompts.shard], "resolution": resolution}
    about |= {"model": model.fingerprint(), "source": source.fingerprint()}
    name = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()
    store = ShardStore(config.cache_folder() / name, {**about, "made_from": [model.name, config.path]})
    entries = fill(store, (latents, prompts), rank, world, wait or (lambda: None), progress)
    _judge(entries["latents"], len(source), config.max_bad_fraction, say=rank == 0)
    counts = {kind: [entry.rows for entry in found] for kind, found in entries.items()}
    return CachedLatents(store, model, resolution, counts, config.variants if isinstance(source, ImageSource) else 1)


def latent_shape(model: Model, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the model's latents at another resolution than its own; InputError where pixels don't divide."""
    channels, *sides = model.latent_shape
    height, width = (side * resolution // model.resolution for side in sides)
    if any(side * resolution % (model.resolution * model.patch) for side in sides):
        pixels = model.resolution * model.patch
        unit = math.lcm(*(pixels // math.gcd(side, pixels) for side in sides))
        raise InputError(
            f"expected a multiple of {unit} pixels, which {model.name!r} needs, got resolution {resolution}; fix "
            "--data.resolution"
        )
    return channels, height, width


def _judge(entries: Sequence[Entry], images: int, max_bad_fraction: float, say: bool) -> None:
    bad = [name for entry in entries for name in entry.bad]
    check_bad(bad, images, max_bad_fraction)
    if bad and say:
        log.warning("%d of %d images cannot be read and are left out: %s", len(bad), images, listed(bad))


def _pairs(values: Tensor) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in values.tolist()]
