"""A folder of safetensors files that survives being killed at any moment: whole files only, listed with their checksums.

Each file is written under another name, flushed and renamed; then manifest.json, which lists size and sha256 of every
file, is replaced in the same way. A file that is not listed, or not as listed, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


class ShardStore:
    """The files of one cache.

    Args:
        folder: its place; made at the first :meth:`commit`.
        about: plain values that say what the cache holds; files of a manifest that says otherwise are not used.

    Raises InputError where the folder cannot be written (no permission, disk full).
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, dict(about)
        self.listed: dict[str, dict[str, Any]] = {}

    def path(self, name: str) -> Path:
        """Where shard `name` is."""
        return self.folder / f"{name}.safetensors"

    def __contains__(self, name: str) -> bool:
        return name in self.listed

    def read_manifest(self, verify: bool) -> bool:
        """Takes up what the folder holds; returns whether there is a manifest of this cache.

        Args:
            verify: read every file and forget those whose size or sha256 is not the listed one.
        """
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            same, listed = manifest["about"] == self.about, dict(manifest["files"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s): the cache is made again", self.folder / MANIFEST, error)
            return False
        if same:
            self.listed = {name: entry for name, entry in listed.items() if not verify or self._is_whole(name, entry)}
        return same

    def _is_whole(self, name: str, entry: Any) -> bool:
        try:
            whole = bool(_entry(self.path(name)) == entry)
        except OSError:
            whole = False
        if not whole:
            log.warning("%s is damaged or missing and is made again", self.path(name))
        return whole

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds or replaces one shard; contiguous CPU tensors."""
        temp = self.folder / f".{name}.{os.getpid()}.tmp"
        if not (self.folder / MANIFEST).exists():
            self.commit()
        try:
            save_file(dict(tensors), temp)
            shutil.copymode(self.folder / MANIFEST, temp)  # safetensors makes files that only their owner can read
            _flush(temp)
            entry = _entry(temp)
            os.replace(temp, self.path(name))
        except (OSError, SafetensorError) as error:
            temp.unlink(missing_ok=True)
            raise self._unwritable(error) from error
        self.listed[name] = entry
        self.commit()

    def commit(self) -> None:
        """Writes the manifest of what there is now."""
        temp = self.folder / f".{MANIFEST}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temp.write_text(json.dumps({"about": self.about, "files": self.listed}, indent=1), encoding="utf-8")
            _flush(temp)
            _flush(self.folder)  # the shards' new names must be on the disk before the manifest that lists them
            os.replace(temp, self.folder / MANIFEST)
            _flush(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def remove_leftovers(self) -> None:
        """Deletes what killed runs left half-written; a day's grace for a run that is at it now."""
        for temp in self.folder.glob(".*.tmp"):
            try:
                if time.time() - temp.stat().st_mtime > 86400:
                    temp.unlink()
            except OSError as error:  # gone, or somebody else's
                log.debug("%s stays: %s", temp, error)

    def _unwritable(self, error: Exception) -> InputError:
        return InputError(
            f"expected to write the latent cache in {str(self.folder)!r}, got: {error}; free some space there, or give "
            "--data.cache_dir another folder"
        )


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
