"""The images of all cells, as numbers in files: resumable at any batch, by as many processes as there are.

A batch is the unit: it is made by one process, and done when its part lies in the cell's folder. When all parts of a cell are
there the main process joins them. A cell that is finished is never written again, and no folder is ever listed to find images,
so that what lies there from before can't count. Once images are made, processes wait for each other's files, not at barriers,
which give up.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..training.folder import LOCK, lock
from .contenders import Contender
from .features import FeatureExtractor, Images
from .generate import denoiser_of
from .latency import count_evaluations
from .plan import Batch, Plan
from .reference import described
from .rows import Cell
from .samples import Samples, image_hashes, is_whole, measured, merged, read_samples, write_tensors
from .scores import Scorer
from .writing import write_whole, writing

CELL, SAMPLES, PARTS, IMAGES = "cell.json", "samples.safetensors", "parts", "images"
KEPT = 64  # images of each cell that stay as PNG

Job = tuple[Cell, Contender]


class Sweep:
    """The cells in one output folder.

    Args:
        folder: where `cells/` is, on a file system that all processes share.
        plan: which images each cell makes.
        features: what they are compared by.
        scorers: by the key of their quantity.
        kept: so many of the first N images stay, as PNG.
        overwrite: cells of another plan or other weights are made again, not refused.
        rank, world, wait: of this process, how many there are, and a barrier.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        plan: Plan,
        features: FeatureExtractor,
        scorers: Mapping[str, Scorer],
        *,
        kept: int = KEPT,
        overwrite: bool = False,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.plan, self.features, self.scorers = Path(folder), plan, features, dict(scorers)
        self.kept, self.overwrite = min(kept, len(plan.prompts)), overwrite
        self.rank, self.world, self.wait = rank, world, wait
        self._todo: dict[Cell, list[Batch]] | None = None

    def place(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / cell.slug

    def claim(self, jobs: Sequence[Job]) -> None:
        """Takes the folder for these cells, and finds what is missing; `run` does it where it wasn't done before.

        Raises InputError for a folder that another process is at or that can't be written to, and for cells in it that were
        made in another way; nothing is made, or lost, before.
        """
        self._begin(jobs)
        batches = self.plan.batches()
        self._todo = {cell: self._missing(number, cell, batches) for number, (cell, _) in enumerate(jobs)}
        self.wait()  # nobody joins parts while others look for theirs

    def run(self, jobs: Sequence[Job], progress: bool = True) -> list[Samples]:
        """Makes what is missing; the samples of all cells on the main process, [] on the others. Raises as `claim` does."""
        if self._todo is None:
            self.claim(jobs)
        todo, self._todo = self._todo or {}, None
        batches = self.plan.batches()
        with _Bar([cell for cell, _ in jobs], todo, progress and self.rank == 0) as bar:
            for cell, contender in jobs:
                for batch in todo[cell]:
                    self._make(cell, contender, batch)
                    bar.advance(cell)
                if self.rank == 0:
                    self._finish(cell, batches)
        return [self.samples(cell) for cell, _ in jobs] if self.rank == 0 else []

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Writes down what each cell is, or finds that it is what lies there."""
        if self.rank == 0:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock(self.folder / LOCK)
            plans = {cell: _plain(self.identity(cell, contender)) for cell, contender in jobs}
            different = {cell: _different(self.place(cell) / CELL, plan) for cell, plan in plans.items()}
            if any(different.values()) and not self.overwrite:
                cell, keys = next((c, keys) for c, keys in different.items() if keys)
                raise InputError(
                    f"expected {str(self.place(cell))!r} to be of this sweep, got another's: {', '.join(keys)} differ; give "
                    "another --output_dir, or --overwrite to make it again"
                )
            for cell, plan in plans.items():
                self._open(cell, plan, bool(different[cell]))
        self.wait()
        if not all((self.place(cell) / CELL).is_file() for cell, _ in jobs):
            raise InputError(
                f"expected the main process's cells in {str(self.folder)!r}, got none; give --output_dir a folder that all "
                "nodes share"
            )

    def _open(self, cell: Cell, plan: dict[str, Any], afresh: bool) -> None:
        place = self.place(cell)
        with writing(place):
            if afresh:
                (place / CELL).unlink()  # first: parts without it are nobody's
            if (place / CELL).is_file():
                return
            for name in (PARTS, IMAGES):
                if (place / name).is_dir():
                    shutil.rmtree(place / name)
            (place / SAMPLES).unlink(missing_ok=True)
        write_whole(place / CELL, (json.dumps(plan, indent=1) + "\n").encode())

    def identity(self, cell: Cell, contender: Contender) -> dict[str, Any]:
        """All that a cell's files depend on."""
        return {
            "model": cell.model,
            "steps": cell.steps,
            "guidance": cell.guidance,
            "weights": contender.weights,
            "dtype": str(denoiser_of(contender.pipe).dtype),
            "schedule": contender.schedule(cell.steps),
            **self.plan.identity(),
            "features": described(self.features),
            "scores": {key: [scorer.name, scorer.weights_hash] for key, scorer in self.scorers.items()},
            "images kept": self.kept,
        }

    def _missing(self, number: int, cell: Cell, batches: Sequence[Batch]) -> list[Batch]:
        """This process's batches of a cell that have no part yet. Turns go on from cell to cell."""
        if is_whole(self.place(cell) / SAMPLES):
            return []
        turn = number * len(batches)
        own = [batch for batch in batches if (turn + batch.number) % self.world == self.rank]
        missing = [batch for batch in own if not is_whole(self._part(cell, batch))]
        for batch in missing:  # a part that was cut short must not be taken for the new one
            with writing(self._part(cell, batch)):
                self._part(cell, batch).unlink(missing_ok=True)
        return missing

    def _part(self, cell: Cell, batch: Batch) -> Path:
        return self.place(cell) / PARTS / f"{batch.number:05d}.safetensors"

    def _make(self, cell: Cell, contender: Contender, batch: Batch) -> None:
        with count_evaluations(denoiser_of(contender.pipe)) as count:
            try:
                images = contender.images(cell, batch.prompts, self.plan, batch.start)
            except InputError as error:
                raise InputError(f"{cell}: {error}") from error
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{cell}: expected room for {len(batch.prompts)} images a call, got: out of memory; lower --batch_size"
                ) from error
        scorers = {} if batch.varied else self.scorers
        tensors = measured(images, batch.prompts, self.features, scorers)
        for index, image in enumerate(images, batch.start):
            if index < self.kept:
                write_whole(self._image(cell, index), _png(image))
        counted = torch.tensor(count.samples, dtype=torch.int64)
        tensors |= {"hashes": image_hashes(images), "evaluations": counted}
        write_tensors(self._part(cell, batch), tensors)  # last: a part says that its images lie there too

    def _finish(self, cell: Cell, batches: Sequence[Batch]) -> None:
        """Waits for all parts of a cell and joins them."""
        path, parts = self.place(cell) / SAMPLES, [(batch, self._part(cell, batch)) for batch in batches]
        if not is_whole(path):
            for _, part in parts:
                while not part.is_file():
                    time.sleep(0.05)
            write_tensors(path, merged(parts))
        with writing(self.place(cell)):
            if (self.place(cell) / PARTS).is_dir():
                shutil.rmtree(self.place(cell) / PARTS)

    def samples(self, cell: Cell) -> Samples:
        """The samples of a finished cell."""
        return read_samples(self.place(cell) / SAMPLES, self.plan)

    def _image(self, cell: Cell, index: int) -> Path:
        return self.place(cell) / IMAGES / f"{index}.png"

    def images(self, cell: Cell, count: int | None = None) -> Images:
        """The first of a finished cell's images that were kept, uint8 [count, H, W, 3]; all of those by default.

        Raises InputError for an image that is gone or is another one than was made.
        """
        count = self.kept if count is None else min(count, self.kept)
        found = []
        for index in range(count):
            try:
                with Image.open(self._image(cell, index)) as file:
                    found.append(np.asarray(file.convert("RGB")))
            except OSError as error:
                raise InputError(
                    f"expected an image at {str(self._image(cell, index))!r}, got: {error}; delete {str(self.place(cell))!r} "
                    "to make that cell again"
                ) from error
        hashes = self.samples(cell).hashes
        if hashes is None or not torch.equal(image_hashes(found), hashes[:count]):  # type: ignore[arg-type]
            raise InputError(
                f"expected the images of {cell} as they were made in {str(self.place(cell))!r}, got others; delete that folder"
            )
        return np.stack(found)


class _Bar:
    """A bar over the cells on stderr. A cell counts by its steps, so that the time left is right."""

    def __init__(self, cells: Sequence[Cell], todo: Mapping[Cell, Sequence[Batch]], shown: bool) -> None:
        from tqdm import tqdm

        self.batches = {cell: len(todo[cell]) for cell in cells}
        work = sum(cell.steps * count for cell, count in self.batches.items())
        form = "cells: {n:.2f}/{total} |{bar}| {elapsed}<{remaining} {postfix}"
        done = sum(not count for count in self.batches.values())
        self.share = (len(cells) - done) / work if work else 0.0
        # `initial`: what was there before took no time, and tells nothing of the time that is left
        options: dict[str, Any] = {"disable": not shown, "file": sys.stderr, "mininterval": 0.5}
        self.bar = tqdm(total=len(cells), initial=done, bar_format=form, **options)

    def advance(self, cell: Cell) -> None:
        """One batch is done."""
        self.bar.set_postfix_str(str(cell), refresh=False)
        self.bar.update(min(cell.steps * self.share, self.bar.total - self.bar.n))  # sums of shares may round up

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found


def _different(path: Path, plan: dict[str, Any]) -> list[str]:
    """Which facts of a cell that is there are others; [] where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return [f"{CELL}, which can't be read,"]
    if not isinstance(found, dict):
        return [f"{CELL}, which can't be read,"]
    return sorted(key for key in {*found, *plan} if found.get(key) != plan.get(key))


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, format="PNG")
    return file.getvalue()
