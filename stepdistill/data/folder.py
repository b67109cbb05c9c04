"""A folder of image files with captions in metadata files or in text files beside the images."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .images import EncodedImages, digest

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
METADATA = ("metadata.jsonl", "metadata.csv")
TWO_WAYS = (
    "give each image a caption: either a metadata.jsonl with one line an image, "
    '{"file_name": "a.png", "text": "a caption"} (or metadata.csv with these columns), or a text file beside it (a.png, '
    "a.txt); for an unconditional model give --data.caption_column none"
)


def visible(folder: Path) -> Iterator[str]:
    """The files under a folder by their relative paths, in no order; without those that are, or lie in what is, hidden."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not hidden(name)]
        inside = Path(place).relative_to(folder).as_posix()
        yield from (name if inside == "." else f"{inside}/{name}" for name in names if not hidden(name))


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's data."""
    return name.startswith((".", "__MACOSX"))


def suffix(name: str) -> str:
    """The suffix of a name in small letters: .png of a/b.PNG."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


class ImageFolder(EncodedImages):
    """All images under a folder, with captions from metadata files (read through `datasets`) or text files beside them.

    Args:
        path: the folder; images may lie in subfolders, names that begin with a dot are ignored.
        caption_column: the metadata column to use; "caption" is tried where it is missing. None: captions are empty.

    The fingerprint takes an image by its file's name, size and time of change, so that a start reads no image.

    Raises InputError for a folder without images, images without a caption, and metadata that names no image.
    """

    def __init__(self, path: str | Path, caption_column: str | None = "text") -> None:
        self.folder = Path(path).expanduser().absolute()
        files = set(visible(self.folder))
        images = {name for name in files if suffix(name) in SUFFIXES}
        named: list[tuple[str, str]] = []
        if caption_column is not None:
            metadata = sorted(self.folder / name for name in files if name.rpartition("/")[2] in METADATA)
            captions = _metadata_captions(metadata, caption_column)
            named = [(image.relative_to(self.folder).as_posix(), caption) for image, caption in captions]
            images |= {name for name, _ in named}
        if not images:
            raise InputError(
                f"expected images ({', '.join(sorted(SUFFIXES))}) in {str(path)!r}, got none; put some there or fix --data.path"
            )
        rest = images - {name for name, _ in named}
        beside = [(name, "") for name in rest] if caption_column is None else _beside(self.folder, rest, files)
        pairs = sorted([*named, *beside])
        self.names, self.captions = [name for name, _ in pairs], [caption for _, caption in pairs]

    def name(self, index: int) -> str:
        return self.names[index]

    def data(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()

    def fingerprint(self) -> str:
        stats = ((self.folder / name).stat() for name in self.names)
        return str(digest(self.names, self.captions, (f"{s.st_size} {s.st_mtime_ns}" for s in stats)).hexdigest())


def _beside(folder: Path, images: set[str], files: set[str]) -> list[tuple[str, str]]:
    """(image, caption) with the captions from a.txt beside a.png."""
    texts = {name: os.path.splitext(name)[0] + ".txt" for name in images}  # noqa: PTH122
    without = sorted(name for name, text in texts.items() if text not in files)
    if without:
        raise InputError(
            f"expected a caption for every image, got none for {len(without)} of them, the first being "
            f"{str(folder / without[0])!r}; {TWO_WAYS}"
        )
    pairs = []
    for name, text in texts.items():
        file = folder / text
        try:
            pairs.append((name, " ".join(file.read_text(encoding="utf-8-sig").split())))
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
