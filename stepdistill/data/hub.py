"""Data sets of the `datasets` library: from the hub, from folders of parquet, arrow, json or csv, from `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..families.loading import hub_is_reachable
from .images import EncodedImages, digest
from .pictures import Unreadable

TABLES = {
    ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder, of one split or of several
SAMPLED = 1024  # images whose bytes enter the fingerprint


class HubImages(EncodedImages):
    """The rows of one split, read from memory-mapped Arrow files when they are asked for.

    Args:
        path: a hub id, a folder or a file.
        split: its name, or where `datasets` takes them a slice such as "train[:1000]".
        image_column: an Image column, encoded bytes, or paths (relative ones start at `path`).
        caption_column: a column of texts; "caption" is tried where it is missing. None: captions are empty.

    The fingerprint takes all captions, the length of every image and the bytes of some: to read all would take minutes.

    Raises InputError for what cannot be loaded, missing columns and missing captions.
    """

    def __init__(
        self, path: str, split: str = "train", image_column: str = "image", caption_column: str | None = "text"
    ) -> None:
        rows = load_rows(path, split)
        if image_column not in rows.column_names:
            raise InputError(
                f"expected a column {image_column!r} in {path!r}, got {rows.column_names}; fix --data.image_column"
            )
        self.folder = Path(path).expanduser().absolute()
        if self.folder.is_file():
            self.folder = self.folder.parent
        self.captions = _captions(rows, path, caption_column) if caption_column is not None else [""] * len(rows)
        self.column, self.rows = image_column, _undecoded(rows.select_columns([image_column]), path, image_column)

    def name(self, index: int) -> str:
        value = self.rows[index][self.column]
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        return f"row {index}" if path is None else f"row {index} ({path})"

    def data(self, index: int) -> bytes:
        value = self.rows[index][self.column]
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is None:
            raise Unreadable("no image in this row")
        return value if isinstance(value, bytes) else (self.folder / value).read_bytes()

    def fingerprint(self) -> str:
        found = digest(self.captions, self._paths_of_files())
        for lengths in self._lengths():
            found.update(lengths.tobytes())
        for index in np.linspace(0, len(self) - 1, min(SAMPLED, len(self)), dtype=np.int64).tolist():
            try:
                found.update(self.data(index))
            except (OSError, Unreadable) as error:
                found.update(type(error).__name__.encode())
        return str(found.hexdigest())

    def _parts(self) -> Iterator[tuple[Any, Any]]:
        """(bytes or None, paths or None) of one run of rows after the other, as Arrow arrays, without a copy of the bytes."""
        import pyarrow.compute  # type: ignore[import-untyped]

        rows = self.rows.with_format("arrow")
        for start in range(0, len(self), 1000):
            for column in rows[start : start + 1000][self.column].chunks:
                if str(column.type).startswith("struct"):
                    yield tuple(pyarrow.compute.struct_field(column, name) for name in ("bytes", "path"))
                elif "binary" in str(column.type):
                    yield column, None
                else:
                    yield None, column

    def _lengths(self) -> Iterator[Any]:
        """The number of bytes of each row, -1 where there are none."""
        import pyarrow.compute

        for data, _ in self._parts():
            if data is not None:
                lengths = pyarrow.compute.binary_length(data).fill_null(-1)
                yield lengths.to_numpy(zero_copy_only=False).astype(np.int64)

    def _paths_of_files(self) -> Iterator[str]:
        """Path, size and time of change of the files of rows without bytes."""
        for data, paths in self._parts():
            if paths is None or (data is not None and not data.null_count):
                continue
            inside = [False] * len(paths) if data is None else data.is_valid().to_pylist()
            for path in (p for p, here in zip(paths.to_pylist(), inside, strict=True) if p is not None and not here):
                file = self.folder / path
                stat = file.stat() if file.is_file() else None
                yield f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}"


def load_rows(path: str, split: str, config_name: str | None = None, section: str = "data") -> Any:
    """The `datasets.Dataset` of this split, and of this configuration of the data set; InputError where there is none.

    Args:
        section: of the options that an error names.
    """
    import datasets

    place = Path(path).expanduser()
    if not place.exists():
        _check_reachable(path)
    try:
        if any((place / name).is_file() for name in SAVED):
            return _saved(datasets.load_from_disk(str(place)), path, split)
        if place.is_file():
            builder = TABLES[place.suffix.lower()]
            return datasets.load_dataset(builder, data_files={"train": [str(place)]}, split=split)
        return datasets.load_dataset(str(place) if place.is_dir() else path, config_name, split=split)
    except InputError:
        raise
    # what pyarrow, pandas, the hub's client and `datasets` raise on missing and broken files
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())[:300]
        flags = f"--{section}.path or --{section}.split"
        if isinstance(error, ValueError) and config_name is None and "Config name is missing" in reason:
            flags = f"--{section}.config_name"
        raise InputError(
            f"expected split {split!r} of a `datasets` data set at {path!r}, got: {reason}; fix {flags}"
        ) from error


def _saved(found: Any, path: str, split: str) -> Any:
    """The split of what `load_from_disk` gave: one split that may not know its name, or several by name."""
    if isinstance(found, dict):
        if split not in found:
            raise InputError(f"expected a split {split!r} in {path!r}, got {sorted(found)}; fix --data.split")
        return found[split]
    if split not in ("train", str(found.split)):
        raise InputError(f"expected split {split!r}, got {path!r}, which holds {found.split} alone; fix --data.split")
    return found


def _check_reachable(path: str) -> None:
    """Says at once what the hub's client would say after minutes."""
    from datasets.load import CachedDatasetModuleFactory

    if hub_is_reachable():
        return
    try:
        CachedDatasetModuleFactory(path).get_module()
    except FileNotFoundError as error:
        raise InputError(
            f"expected a hub id or what is on this machine in --data.path, got {path!r}, which is neither a file or folder "
            "here nor in the cache of `datasets`, and the hub cannot be reached; fix --data.path, or download it first"
        ) from error


def _undecoded(rows: Any, path: str, column: str) -> Any:
    """The image column as bytes and paths; what cannot be decoded is ours to name."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string", "large_string"):
        return rows
    if isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
        return rows
    raise InputError(
        f"expected images, encoded bytes or paths in column {column!r} of {path!r}, got {feature}; fix --data.image_column"
    )


def _captions(rows: Any, path: str, column: str) -> list[str]:
    import datasets

    key = column if column in rows.column_names else "caption"
    if key not in rows.column_names:
        raise InputError(
            f"expected a column {column!r} in {path!r}, got {rows.column_names}; fix --data.caption_column (none: no captions)"
        )
    feature = rows.features[key]
    texts = rows.select_columns([key]).with_format("arrow")[:][key].to_pylist()
    if None in texts:
        raise InputError(
            f"expected a caption in every row of {path!r}, got none in {texts.count(None)}, the first being row "
            f"{texts.index(None)}; fill or drop these rows, or fix --data.caption_column"
        )
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(label) for label in texts]
    if not isinstance(feature, datasets.Value) or not feature.dtype.endswith("string") and "int" not in feature.dtype:
        raise InputError(
            f"expected one caption an image in column {key!r} of {path!r}, got {feature}; fix --data.caption_column"
        )
    return [str(text) for text in texts]  # numbers are the captions of class-conditional models
