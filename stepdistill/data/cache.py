"""A folder of safetensors files that survives being killed at any moment, and that several processes fill at once.

Each shard is written under another name, flushed and renamed; then a small JSON beside it, which lists its size, sha256 and
rows, comes about in the same way. A shard without its JSON, or not as listed there, counts as missing. No file is shared by two
writers: about.json says what the folder holds and is written once.

A finished cache is not read through at every start. The JSON also holds the time at which the shard was last changed: where
size and time are still those, the shard is taken to be whole; where the time is another (a copy, a restored backup, a damaged
file), it is hashed once, and the new time is noted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError

ABOUT = "about.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What the JSON beside a shard says.

    Attributes:
        size: bytes of the shard.
        sha256: of the shard.
        mtime_ns: when it was last changed.
        rows: how many rows its tensors have.
        bad: "name (reason)" of images that could not be read and have no row.
    """

    size: int
    sha256: str
    mtime_ns: int
    rows: int
    bad: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Entry:
        """From JSON; raises ValueError for anything else."""
        values = json.loads(text)
        try:
            entry = cls(**values)
            if not all(isinstance(v, int) for v in (entry.size, entry.mtime_ns, entry.rows)):
                raise TypeError("numbers are missing")
            return cls(**{**values, "bad": tuple(str(b) for b in entry.bad)})
        except TypeError as error:
            raise ValueError(str(error)) from error


class ShardStore:
    """The files of one cache.

    Args:
        folder: its place; made by :meth:`begin`.
        about: plain values that say what the cache holds, for whoever looks into the folder.
        what: it is called in messages.
        flag: the option that names its place, for messages.

    Raises InputError where the folder cannot be written (no permission, disk full).
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], what: str = "latent cache", flag: str = "--data.cache_dir"
    ) -> None:
        self.folder, self.about, self.what, self.flag = folder, dict(about), what, flag

    def path(self, name: str) -> Path:
        """Where shard `name` is."""
        return self.folder / f"{name}.safetensors"

    def begin(self) -> None:
        """Makes the folder with about.json and clears what killed runs left; to be called by one process."""
        if not self.has_begun():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._put(ABOUT, json.dumps(self.about, indent=1))
            except OSError as error:
                raise self._unwritable(error) from error
        self._remove_leftovers()

    def said(self) -> dict[str, Any]:
        """What about.json says; {} where there is none. InputError for anything else than JSON of a cache."""
        path = self.folder / ABOUT
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"expected a {self.what} at {str(self.folder)!r}, got {path}: {error}; fix {self.flag}"
            ) from error

    def has_begun(self) -> bool:
        """Whether some process has called :meth:`begin` here."""
        return (self.folder / ABOUT).is_file()

    def has(self, name: str) -> bool:
        """Whether shard `name` was finished; a quick look at the names alone."""
        return (self.folder / f"{name}.json").is_file()

    def find(self, name: str) -> Entry | None:
        """The entry of a shard that is there as it was written, else None.

        What is damaged is said, and forgotten: its JSON goes, so that nobody takes the shard for finished.
        """
        found = self.look(name)
        if isinstance(found, Entry):
            return found
        if found:
            log.warning("%s is damaged or missing (%s) and is made again", self.path(name), found)
            try:
                (self.folder / f"{name}.json").unlink(missing_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
        return None

    def look(self, name: str) -> Entry | str:
        """The entry of a shard that is there as it was written, else what is wrong with it, "" where it was never finished."""
        sidecar, path = self.folder / f"{name}.json", self.path(name)
        try:
            entry = Entry.read(sidecar.read_text(encoding="utf-8"))
            stat = path.stat()
            if stat.st_size == entry.size and stat.st_mtime_ns == entry.mtime_ns:
                return entry
            if stat.st_size == entry.size and _sha256(path) == entry.sha256:
                return self._restamped(name, entry, stat.st_mtime_ns)
            return "not as it was written"
        except (OSError, ValueError) as error:
            return str(error) if sidecar.exists() else ""

    def _restamped(self, name: str, entry: Entry, mtime_ns: int) -> Entry:
        entry = Entry(**{**asdict(entry), "mtime_ns": mtime_ns})
        try:
            self._put(f"{name}.json", json.dumps(asdict(entry)))
        except OSError as error:  # a cache that one may only read is hashed each time
            log.debug("%s keeps its old time: %s", name, error)
        return entry

    def write(self, name: str, tensors: Mapping[str, Tensor], rows: int, bad: Sequence[str] = ()) -> Entry:
        """Adds or replaces one shard; contiguous CPU tensors."""
        temp = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            save_file(dict(tensors), temp)
            shutil.copymode(self.folder / ABOUT, temp)  # safetensors makes files that only their owner can read
            _flush(temp)
            stat = temp.stat()
            entry = Entry(stat.st_size, _sha256(temp), stat.st_mtime_ns, rows, tuple(bad))
            os.replace(temp, self.path(name))
            _flush(self.folder)  # the shard's new name must be on the disk before the JSON that speaks of it
            self._put(f"{name}.json", json.dumps(asdict(entry)))
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error
        finally:
            temp.unlink(missing_ok=True)
        return entry

    def _put(self, name: str, text: str) -> None:
        temp = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            temp.write_text(text, encoding="utf-8")
            _flush(temp)
            os.replace(temp, self.folder / name)
            _flush(self.folder)
        finally:
            temp.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Deletes what killed runs left half-written; a day's grace for a run that is at it now."""
        for temp in self.folder.glob(".*.tmp"):
            try:
                if time.time() - temp.stat().st_mtime > 86400:
                    temp.unlink()
            except OSError as error:  # gone, or somebody else's
                log.debug("%s stays: %s", temp, error)

    def _unwritable(self, error: Exception) -> InputError:
        return InputError(
            f"expected to write the {self.what} in {str(self.folder)!r}, got: {error}; free some space there, or give "
            f"{self.flag} another folder"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
