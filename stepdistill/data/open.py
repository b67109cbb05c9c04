"""Which source `--data.path` names."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from ..families.loading import is_local
from .config import DataConfig
from .folder import METADATA, SUFFIXES, ImageFolder, suffix, visible
from .hub import SAVED, TABLES, HubImages
from .images import Source, WorldImages
from .prompts import Prompts
from .tars import TarShards

POSSIBLE = (
    'give --data.path "demo", a folder of images with captions, .tar shards (a folder of them, or "shards/{000..003}.tar"), a '
    "data set of `datasets` (a hub id such as org/name, a folder or file of parquet, arrow, json or csv, or a folder that "
    "save_to_disk made), or a .txt file of prompts, one a line"
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_source(config: DataConfig) -> Source:
    """The source that `config.path` names; what is wrong with it, but for single unreadable images, is said now.

    A folder with image files (or their metadata) is an image folder whatever else lies there; after that .tar shards go before
    tables. Raises InputError.
    """
    path, column = config.path, None if config.caption_column == "none" else config.caption_column
    place = Path(path).expanduser()
    if path == "demo":
        return WorldImages(config.demo_images, column is not None)
    if place.suffix == ".txt":
        return Prompts.read(path)
    kind = _kind_of_folder(place) if place.is_dir() else place.suffix.lower()
    if kind == ".tar":
        return TarShards(path, column)
    if kind == "images":
        return ImageFolder(place, column)
    if kind in TABLES and place.exists() or not is_local(path) and HUB_ID.fullmatch(path):
        return HubImages(path, config.split, config.image_column, column)
    found = "a file of another kind" if place.exists() else "nothing there"
    raise InputError(f"expected training data at {path!r}, got {found}; {POSSIBLE}")


def _kind_of_folder(folder: Path) -> str:
    """What a folder holds: "images", ".tar" or the suffix of a table; InputError for none of them."""
    if any((folder / name).is_file() for name in SAVED):
        return ".arrow"
    found: set[str] = set()
    for name in visible(folder):
        if suffix(name) in SUFFIXES or name.rpartition("/")[2] in METADATA:
            return "images"
        found.add(suffix(name))
    kind = next((kind for kind in (".tar", *TABLES) if kind in found), None)
    if kind is None:
        raise InputError(
            f"expected images ({', '.join(sorted(SUFFIXES))}), .tar shards or tables in {str(folder)!r}, got none; {POSSIBLE}"
        )
    return kind
