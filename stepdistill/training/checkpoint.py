"""Checkpoints that are either whole or not there: a manifest with hashes, one atomic rename, and no pickle.

A checkpoint is a folder `<step>` of safetensors files, a state.json and a manifest.json with the size and sha256 of
each file. It is written under a hidden name, flushed to disk and renamed; loading verifies it and falls back to the
newest good one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from .state import join_state as join_state
from .state import split_state as split_state

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
TEMP, REPLACED, ABANDONED = ".saving-", ".replaced-", "abandoned-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is what was saved as JSON; tensors are read when asked for."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU in the dtype they had; {} when nothing was saved under it."""
        manifest, problem = _read_manifest(self.path)
        if problem:
            raise InputError(f"expected a whole checkpoint, got {problem}; resume from another one")
        file = f"{name}.safetensors"
        if file not in manifest["files"]:
            return {}
        try:
            return load_file(self.path / file)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"expected tensors in {self.path / file}, got: {error}; resume from another one"
            ) from error


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie, `<run>/checkpoints`; made at the first save.
        limit: how many are kept, never fewer than 2, so that one damaged file can't end a run. None: all.
    """

    def __init__(self, folder: Path, limit: int | None = 2) -> None:
        self.folder = Path(folder)
        self.limit = None if limit is None else max(2, limit)

    def save(self, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Commits one checkpoint, then removes the oldest beyond the limit. Call on one process only.

        Args:
            step: the global step; a checkpoint of the same step is replaced.
            files: name -> tensors, one `<name>.safetensors` each. Tied tensors are written in full each.
            state: JSON scalars, lists and dicts with string keys (:func:`split_state` makes such a dict).

        Raises:
            InputError: the disk is full or not writable; the older checkpoints are then as they were.
        """
        text = json.dumps(dict(state), indent=1, allow_nan=False)
        if json.loads(text) != dict(state):
            raise ValueError("state must come back from JSON as it went in (string keys, no tuples); use split_state()")
        for name in files:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"expected a plain file name for tensors, got {name!r}")
        temp, final = self.folder / f"{TEMP}{step}", self.folder / str(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{TEMP}*"):  # of saves that were killed
                shutil.rmtree(leftover)
            _write(temp, step, files, text)
            self._commit(temp, final)
        except (OSError, SafetensorError) as error:
            kept = ", ".join(str(s) for s in self.steps()) or "none"
            raise InputError(
                f"expected to save step {step} under {self.folder}, got: {error}; older checkpoints are untouched "
                f"({kept}). Free some space or fix the permissions, then resume from the latest"
            ) from error
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        self.set_aside_later(step)
        self._rotate(final)
        return final

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, good or damaged, in ascending order."""
        return sorted({step for step, _ in self._folders()})

    def find(self, which: str = "latest", strict: bool = False) -> Checkpoint | None:
        """The checkpoint to resume from, verified.

        Args:
            which: "latest", a step, or the path of a checkpoint folder.
            strict: with "latest", do not fall back to an older one when the newest is damaged.

        Returns:
            None only for "latest" when there is no checkpoint at all.

        Raises:
            InputError: the one asked for is missing or damaged, or every one is.
        """
        folders = self._folders()
        if which != "latest":
            named = [path for step, path in folders if which.isdecimal() and step == int(which)]
            if not named and not which.isdecimal() and which and Path(which).is_dir():
                named = [Path(which)]
            if not named:
                known = ", ".join(str(s) for s in self.steps()) or "none"
                raise InputError(
                    f"expected 'latest', a step or a checkpoint's folder, got {which!r}; {self.folder} holds: {known}"
                )
            folders = [(0, path) for path in named]
        problems: list[str] = []
        for _, path in folders:
            found, problem = _open(path)
            if found is not None:
                for passed in problems:
                    log.warning("damaged checkpoint passed over: %s; going back to step %d", passed, found.step)
                return found
            problems.append(problem)
            if strict:
                break
        if problems:
            raise InputError(
                f"expected a whole checkpoint, got damage: {'; '.join(problems)}. Resume from another one of "
                f"{self.folder}, or move these away to start afresh"
            )
        return None

    def _folders(self) -> list[tuple[int, Path]]:
        """(step, folder), newest first; after each, the one that it was replacing when the process was killed."""
        found: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            replaced = path.name.startswith(REPLACED)
            digits = path.name.removeprefix(REPLACED)
            if digits.isdecimal() and path.is_dir():
                found.append((-int(digits), int(replaced), path))
        return [(-step, path) for step, _, path in sorted(found)]

    def _commit(self, temp: Path, final: Path) -> None:
        """Moves a finished folder to its name. An older one of that name stays findable until the new one is there."""
        aside = self.folder / f"{REPLACED}{final.name}"
        try:
            if final.exists():
                if aside.exists():  # left by a kill after its successor was committed
                    shutil.rmtree(aside)
                final.rename(aside)
            temp.rename(final)
        finally:
            if aside.exists() and not final.exists():
                aside.rename(final)
        _sync(self.folder)
        _sync(self.folder.parent)
        for path in self.folder.glob(f"{REPLACED}*"):
            owner = self.folder / path.name.removeprefix(REPLACED)
            if owner.exists():
                self._remove(path)
            else:
                path.rename(owner)

    def set_aside_later(self, step: int) -> None:
        """Renames checkpoints of later steps, a future that the run goes back on, so that "latest" can't jump there."""
        for later, path in self._folders():
            if later > step:
                log.warning("checkpoint %s is of a later step than %d: set aside as abandoned", path, step)
                aside = self.folder / f"{ABANDONED}{later}"
                try:
                    if aside.exists():
                        shutil.rmtree(aside)
                    path.rename(aside)
                except OSError as error:
                    log.warning("could not set %s aside: %s", path, error)

    def _rotate(self, saved: Path) -> None:
        if self.limit is None:
            return
        kept = self.steps()[-self.limit :]
        if len(kept) == self.limit:
            for path in self.folder.glob(f"{ABANDONED}*"):
                self._remove(path)
        for step, path in self._folders():
            if step not in kept and path != saved:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Removes a folder that is no longer needed; hidden first, so that a kill never leaves half a checkpoint."""
        try:
            gone = self.folder / f"{TEMP}removed-{path.name}"
            path.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", path, error)


def _write(temp: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
    temp.mkdir()
    (temp / STATE).write_text(state, encoding="utf-8")
    for name, tensors in files.items():
        path = temp / f"{name}.safetensors"
        save_file(_detached(tensors), path)
        shutil.copymode(temp / STATE, path)  # safetensors makes files that only their owner can read
    listed = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temp.iterdir())}
    for file in listed:
        _sync(temp / file)
    manifest = {"format": FORMAT, "step": step, "files": listed}
    (temp / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(temp / MANIFEST)
    _sync(temp)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU, and no two on one storage (safetensors refuses those)."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return out


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """(manifest, "") or ({}, what is wrong)."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return {}, f"{path} of format {manifest['format']!r} where this version reads {FORMAT}"
        if STATE not in manifest["files"] or type(manifest["step"]) is not int:
            return {}, f"{path} (unreadable manifest: no {STATE} or step)"
        if folder.name.isdecimal() and int(folder.name) != manifest["step"]:
            return {}, f"{path} (its step is {manifest['step']}, its folder's {folder.name})"
        for file, entry in manifest["files"].items():
            if Path(file).name != file or not {"size", "sha256"} <= set(entry):
                return {}, f"{path} (unreadable manifest: entry {file!r})"
    except FileNotFoundError:
        return {}, f"{path} (missing)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, f"{path} (unreadable manifest: {error!r})"
    return manifest, ""


def _open(folder: Path) -> tuple[Checkpoint | None, str]:
    """(checkpoint, "") if every listed file is as it was written, else (None, the first damage). Reads nothing else."""
    manifest, problem = _read_manifest(folder)
    if problem:
        return None, problem
    try:
        for file, entry in manifest["files"].items():
            path = folder / file
            if not path.is_file():
                return None, f"{path} (missing)"
            if path.stat().st_size != entry["size"]:
                return None, f"{path} (size {path.stat().st_size}, expected {entry['size']})"
            if _sha256(path) != entry["sha256"]:
                return None, f"{path} (hash differs from the manifest's)"
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError as error:
        return None, f"{folder} (cannot be read: {error})"
    return Checkpoint(folder, manifest["step"], state), ""
