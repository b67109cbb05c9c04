"""Captioned images: a folder of the user's, or the demo world drawn by code."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo.world import TRAIN_SEED, World
from ..errors import InputError
from .pictures import UNREADABLE, Picture, check, load

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
METADATA = ("metadata.jsonl", "metadata.csv")
TWO_WAYS = (
    "give each image a caption: either a metadata.jsonl with one line an image, "
    '{"file_name": "a.png", "text": "a caption"} (or metadata.csv with these columns), or a text file beside it (a.png, a.txt)'
)


@dataclass
class DataConfig:
    """Which images to train on, and where their latents are cached.

    Attributes:
        path: an image folder with captions, or "demo" for images drawn by code.
        resolution: side of the square images in pixels; the model's own by default.
        caption_column: column of metadata.jsonl or .csv that holds the captions ("caption" is also tried).
        demo_images: how many images path "demo" has.
        encode_batch_size: images or prompts encoded at once while the cache is made.
        cache_dir: where caches go; by default $STEPDISTILL_CACHE, $XDG_CACHE_HOME/stepdistill or ~/.cache/stepdistill.
    """

    path: str = "demo"
    resolution: int | None = None
    caption_column: str = "text"
    demo_images: int = 4096
    encode_batch_size: int = 16
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise InputError(
                f"expected a positive multiple of 8 pixels, got resolution {self.resolution}; fix --data.resolution"
            )
        for name, value in (("demo_images", self.demo_images), ("encode_batch_size", self.encode_batch_size)):
            if value < 1:
                raise InputError(f"expected {name} >= 1, got {value}; fix --data.{name}")

    def cache_folder(self) -> Path:
        """`cache_dir`, or the place that the environment names."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.cache_dir or os.environ.get("STEPDISTILL_CACHE") or f"{home}/stepdistill").expanduser()


class ImageSource(ABC):
    """A finite list of captioned images that never changes order.

    Attributes:
        names: what errors call each image.
        captions: one an image.
    """

    names: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    @abstractmethod
    def picture(self, index: int, resolution: int) -> Picture:
        """Image `index` as a square of `resolution` pixels. Raises InputError where it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all images and captions, in order."""


class WorldImages(ImageSource):
    """The first `count` images of the demo's training world, drawn at whatever resolution is asked for."""

    def __init__(self, count: int) -> None:
        self.names = [f"demo image {i}" for i in range(count)]
        self.captions = World(TRAIN_SEED).captions(range(count))

    def picture(self, index: int, resolution: int) -> Picture:
        return Picture(World(TRAIN_SEED, resolution).pixels([index])[0], (resolution, resolution), (0, 0))

    def fingerprint(self) -> str:
        digest = _digest(*self.captions)
        # the pixels are a function of code: a few of them tell when it was changed
        digest.update(World(TRAIN_SEED).pixels(range(min(32, len(self)))).numpy().tobytes())
        return digest.hexdigest()


class ImageFolder(ImageSource):
    """All images under a folder, with captions from metadata files (read through `datasets`) or text files beside them.

    Args:
        path: the folder; images may lie in subfolders, names that begin with a dot are ignored.
        caption_column: the metadata column to use; "caption" is tried where it is missing.

    Raises InputError for a folder that is missing or empty, images without a caption, metadata that names no image, and
    unreadable images (all files are read once, which also makes the fingerprint).
    """

    def __init__(self, path: str | Path, caption_column: str = "text") -> None:
        self.folder = Path(path).expanduser().absolute()
        if not self.folder.is_dir():
            found = "a file" if self.folder.exists() else "nothing"
            raise InputError(f"expected an image folder at {str(path)!r}, got {found} there; fix --data.path")
        files = sorted(f for f in self.folder.rglob("*") if f.is_file() and not self._hidden(f))
        named = _metadata_captions([f for f in files if f.name in METADATA], caption_column)
        images = {f for f in files if f.suffix.lower() in SUFFIXES} | {f for f, _ in named}
        if not images:
            raise InputError(
                f"expected images ({', '.join(sorted(SUFFIXES))}) in {str(path)!r}, got none; put some there or fix --data.path"
            )
        beside = _beside(images - {f for f, _ in named})
        pairs = sorted((f.relative_to(self.folder).as_posix(), caption) for f, caption in (*named, *beside))
        self.names, self.captions = [name for name, _ in pairs], [caption for _, caption in pairs]
        self._fingerprint = self._read_all()

    def _hidden(self, file: Path) -> bool:
        return any(part.startswith((".", "__MACOSX")) for part in file.relative_to(self.folder).parts)

    def _read_all(self) -> str:
        """The fingerprint; raises InputError with the first unreadable images and their number."""
        digest, bad = _digest(*self.names, *self.captions), []
        for name in self.names:
            try:
                data = (self.folder / name).read_bytes()
                digest.update(hashlib.blake2b(data, digest_size=16).digest())
                check(data)
            except UNREADABLE as error:
                bad.append(f"{name} ({' '.join(str(error).split()) or type(error).__name__})")
        if bad:
            count = f"all {len(bad)}" if len(bad) == len(self) else f"{len(bad)} of {len(self)}"
            more = "" if len(bad) <= 5 else ", ..."
            raise InputError(
                f"expected readable images in {str(self.folder)!r}, got {count} unreadable: {', '.join(bad[:5])}{more}; "
                "repair or delete these files"
            )
        return digest.hexdigest()

    def picture(self, index: int, resolution: int) -> Picture:
        file = self.folder / self.names[index]
        try:
            return load(file.read_bytes(), resolution)
        except UNREADABLE as error:
            raise InputError(f"expected a readable image, got {str(file)!r}: {error}; repair or delete it") from error

    def fingerprint(self) -> str:
        return self._fingerprint


def open_images(config: DataConfig) -> ImageSource:
    """The source that `config.path` names; images of a folder are checked now, so that errors come at once."""
    if config.path == "demo":
        return WorldImages(config.demo_images)
    return ImageFolder(config.path, config.caption_column)


def _digest(*texts: str) -> Any:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest


def _beside(images: set[Path]) -> list[tuple[Path, str]]:
    """(image, caption) with the captions from a.txt beside a.png."""
    without = sorted(f for f in images if not f.with_suffix(".txt").is_file())
    if without:
        raise InputError(
            f"expected a caption for every image, got none for {len(without)} of them, the first being "
            f"{str(without[0])!r}; {TWO_WAYS}"
        )
    pairs = []
    for image in images:
        file = image.with_suffix(".txt")
        try:
            pairs.append((image, " ".join(file.read_text(encoding="utf-8-sig").split())))
        except UnicodeDecodeError as error:
            raise InputError(f"expected UTF-8 text in {str(file)!r}, got {error.reason}; save it as UTF-8") from error
    return pairs


def _metadata_captions(files: list[Path], column: str) -> list[tuple[Path, str]]:
    """(image, caption) of all rows of the metadata files; paths are relative to the file that names them."""
    pairs = []
    for file in files:
        for row in _rows(file):
            if not row.get("image"):
                raise InputError(f"expected a file_name in every line of {str(file)!r}, got {row}; {TWO_WAYS}")
            image = Path(row["image"]["path"])
            if not image.is_file():
                raise InputError(
                    f"expected the images that {str(file)!r} names, got no file {str(image)!r}; fix file_name"
                )
            key = column if column in row else "caption"
            if key not in row:
                columns = sorted(set(row) - {"image"})
                raise InputError(
                    f"expected a column {column!r} in {str(file)!r}, got {columns}; fix --data.caption_column"
                )
            value = row[key]
            if isinstance(value, list | dict):
                raise InputError(
                    f"expected one caption an image in column {key!r}, got {value!r} in {str(file)!r}; give text"
                )
            if value is None or (isinstance(value, float) and math.isnan(value)):  # how an empty CSV cell arrives
                raise InputError(
                    f"expected a caption for {str(image)!r}, got an empty cell in {str(file)!r}; {TWO_WAYS}"
                )
            pairs.append((image, str(value)))
    return pairs


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of one metadata file, {"image": {"path": ...}, column: value}, by the imagefolder reader of `datasets`."""
    import datasets

    try:
        # streaming keeps it from writing a copy into its own cache; an explicit split keeps folder names from becoming splits
        rows = datasets.load_dataset(
            "imagefolder", data_files={"train": [glob.escape(str(file))]}, split="train", streaming=True
        )
        return list(rows.cast_column("image", datasets.Image(decode=False)))
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:  # what pyarrow, pandas and datasets raise
        reason = "no lines" if isinstance(error, IndexError) else " ".join(str(error).split())[:300]
        raise InputError(
            f"expected one line an image with file_name and a caption in {str(file)!r}, got: {reason}; {TWO_WAYS}"
        ) from error
