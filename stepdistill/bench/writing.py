"""Files that are there as a whole or not at all, and what is said where they can't be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


def check_folder(path: str) -> None:
    """InputError for a folder that can't be made or written to."""
    place = Path(path).expanduser().absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"expected a folder, got a file at {there} in --output_dir {path}; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"expected a folder to write to, got {there} in --output_dir {path}; fix its permissions or give another"
        )


@contextmanager
def writing(path: str | os.PathLike[str], flag: str = "--output_dir") -> Iterator[None]:
    """An InputError in place of an OSError in what is done inside: a full disk, a folder that is no one's to write to.

    Args:
        path: what is written.
        flag: where it was given, for the message.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"expected to write {str(path)!r}, got: {error.strerror or error}; make room or fix the permissions and start "
            f"again, what is finished is kept; or give another {flag}"
        ) from error


def write_whole(path: str | os.PathLike[str], data: bytes, flag: str = "--output_dir") -> None:
    """One file, with the folders above it; after a kill or a power cut the old one is there, or the new one.

    Raises InputError where that can't be.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the same name always: what a kill leaves is written over
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
