"""Images as the autoencoder's posterior and captions as embeddings, computed once and kept on disk.

The posterior's mean and standard deviation are stored, not a sample of it: each step draws its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..batch import Batch, move
from ..errors import InputError
from ..families.model import Model
from ..randomness import StepRandom
from .cache import ShardStore
from .images import ImageSource
from .prompts import embed_prompts, unique

FORMAT = 1  # to be raised whenever the same image or caption would give other tensors, or they lie elsewhere
SHARD = 256  # images or prompts a file


class CachedLatents:
    """The data set of a finished cache; rows are read from the memory-mapped shards when they are asked for.

    Args:
        store: a cache made by :func:`cache_latents`.
        model: gives the "no prompt" condition and, where a family has them, the size conditions.
        length: how many images there are.
        resolution: their side in pixels.
        shard: images, or prompts, a file.
    """

    def __init__(self, store: ShardStore, model: Model, length: int, resolution: int, shard: int = SHARD) -> None:
        self.store, self.model, self.resolution = store, model, resolution
        self._length, self._shard = length, shard
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._length

    def _shards(self, kind: str, rows: Sequence[int]) -> Iterator[tuple[Any, int]]:
        for row in rows:
            number, place = divmod(row, self._shard)
            name = f"{kind}-{number:05d}"
            if name not in self._open:
                self._open[name] = safe_open(self.store.path(name), framework="pt")
            yield self._open[name], place

    def rows(self, kind: str, rows: Sequence[int]) -> dict[str, Tensor]:
        """The stored tensors of images ("latents") or prompts ("prompts") by number, [len(rows), ...] each."""
        found = [{key: file.get_slice(key)[i] for key in file.keys()} for file, i in self._shards(kind, rows)]  # noqa: SIM118
        return {key: torch.stack([row[key] for row in found]) for key in found[0]}

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """x0 = mean + std * n with n ~ N(0, 1) of the stream "posterior", and the conditions of each image's caption."""
        if any(not 0 <= i < len(self) for i in indices):
            raise IndexError(f"expected indices in [0, {len(self)}), got {list(indices)}")
        images = self.rows("latents", indices)
        mean, std = images["mean"], images["std"]
        x0 = mean + std * rng.to("cpu").normal("posterior", mean.shape[1:])
        target = [(self.resolution, self.resolution)] * len(indices)
        size = self.model.size_cond(_pairs(images["original"]), _pairs(images["crop"]), target)
        cond = {**self.rows("prompts", images["prompt"].tolist()), **move(size, "cpu")}
        return Batch(x0, cond, move(self.model.uncond(cond), "cpu"), rng)


def cache_latents(
    model: Model,
    source: ImageSource,
    resolution: int,
    folder: str | Path,
    batch_size: int = 16,
    progress: bool = True,
    *,
    main: bool = True,
    wait: Callable[[], None] | None = None,
    shard: int = SHARD,
) -> CachedLatents:
    """Encodes all images and captions into a subfolder of `folder`, or takes up what an earlier run left there.

    The subfolder's name is a hash of the model, the images, the captions and the resolution. A finished cache is read
    through once to check it; only missing or damaged shards are made, with the model where it is.

    Args:
        model: whose autoencoder and text encoder are used.
        source: the images.
        resolution: side of the squares in pixels, a multiple of 8.
        folder: of all caches; with several nodes, on a file system that they share.
        batch_size: images or prompts encoded at once.
        progress: show how far it is.
        main: whether this process is the one that writes; the others wait for it.
        wait: a barrier over all processes; needed where there are several.
        shard: images, or prompts, a file.

    Raises InputError for unreadable images, latents that are not finite, and a folder that cannot be written.
    """
    texts, rows = unique(source.captions)
    names = [*_names("latents", len(source), shard), *_names("prompts", len(texts), shard)]
    about = {"format": FORMAT, "images": len(source), "prompts": len(texts), "resolution": resolution, "shard": shard}
    store = ShardStore(Path(folder).expanduser() / _key(model, source, resolution), about)
    if main:
        store.read_manifest(verify=True)
        store.remove_leftovers()
        store.commit()
    if wait is not None:
        wait()
    if main:
        report = _reporter(progress)
        _write_latents(store, model, source, resolution, rows, shard, batch_size, report)
        _write_prompts(store, model, texts, shard, batch_size, report)
    else:
        _await(store, names)
    if wait is not None:
        wait()
    return CachedLatents(store, model, len(source), resolution, shard)


def _key(model: Model, source: ImageSource, resolution: int) -> str:
    parts = json.dumps([FORMAT, model.fingerprint(), source.fingerprint(), resolution])
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


def _names(kind: str, length: int, shard: int) -> list[str]:
    return [f"{kind}-{i:05d}" for i in range(-(-length // shard))]


def _pairs(values: Tensor) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in values.tolist()]


def _await(store: ShardStore, names: Sequence[str]) -> None:
    """Polls until the main process is done: encoding may take hours, and barriers give up after ten minutes."""
    while not all(name in store for name in names):
        if not store.read_manifest(verify=False):
            raise InputError(
                f"expected the main process's latent cache in {str(store.folder)!r}, got none; give --data.cache_dir a folder "
                "that all nodes share"
            )
        time.sleep(0.2)


def _reporter(progress: bool) -> Callable[[str, int, int], None]:
    """(what, done, of) -> a line on stderr, overwritten on a terminal."""
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")

    def report(what: str, done: int, of: int) -> None:
        if progress:
            print(
                f"{start}caching {what}: {done} of {of}", end="\n" if done == of else end, file=sys.stderr, flush=True
            )

    return report


@torch.no_grad()
def _write_latents(
    store: ShardStore, model: Model, source: ImageSource, resolution: int, rows: Sequence[int], shard: int, batch_size: int,
    report: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    with ThreadPoolExecutor(
        min(4, os.cpu_count() or 1)
    ) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        for number, name in enumerate(_names("latents", len(source), shard)):
            if name in store:
                continue
            inside = range(number * shard, min((number + 1) * shard, len(source)))
            parts: list[dict[str, Tensor]] = []
            for start in range(inside.start, inside.stop, batch_size):
                chosen = range(start, min(start + batch_size, inside.stop))
                pictures = list(pool.map(lambda i: source.picture(i, resolution), chosen))
                mean, std = model.posterior(torch.stack([picture.pixels for picture in pictures]))
                _check_finite(mean, std, [source.names[i] for i in chosen])
                parts.append({
                    "mean": mean.float().cpu(),
                    "std": std.float().cpu(),
                    "original": torch.tensor([picture.original for picture in pictures]),
                    "crop": torch.tensor([picture.crop for picture in pictures]),
                    "prompt": torch.tensor([rows[i] for i in chosen]),
                })  # fmt: skip
            store.write(name, _stack(parts))
            report("images", inside.stop, len(source))


def _write_prompts(
    store: ShardStore, model: Model, texts: Sequence[str], shard: int, batch_size: int,
    report: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    for number, name in enumerate(_names("prompts", len(texts), shard)):
        if name in store:
            continue
        inside = texts[number * shard : (number + 1) * shard]
        store.write(name, embed_prompts(model, inside, batch_size))
        report("captions", number * shard + len(inside), len(texts))


def _stack(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}


def _check_finite(mean: Tensor, std: Tensor, names: Sequence[str]) -> None:
    good = torch.isfinite(mean).flatten(1).all(1) & torch.isfinite(std).flatten(1).all(1)
    if not bool(good.all()):
        name = names[int((~good).nonzero()[0])]
        raise InputError(
            f"expected finite latents, got NaN or infinity for {name!r}; if every image does it, the autoencoder overflows "
            "in half precision: give --teacher.vae one that does not, e.g. madebyollin/sdxl-vae-fp16-fix"
        )
