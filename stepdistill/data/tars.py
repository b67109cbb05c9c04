"""WebDataset shards: .tar files with members key.jpg and key.txt (or key.json). Read by offset, no dependency needed."""

from __future__ import annotations

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .folder import hidden, visible
from .images import EncodedImages, digest

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption", "json")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    """Where a member's bytes lie: number of the shard, offset, length."""

    shard: int
    offset: int
    size: int


class TarShards(EncodedImages):
    """The images of tar files, in the files' order, at random access: the headers are read once, bytes when asked for.

    Args:
        path: a folder of .tar files, one file, or several as "shards/{000..003}.tar" or "shards/*.tar".
        caption_column: the field of key.json that holds the caption; without it key.txt, key.caption or the field "caption" is
            taken. None: captions are empty.

    As in WebDataset, the key ends at the first dot of a member's file name. The fingerprint takes a shard by name, size and
    time of change.

    Raises InputError for missing, damaged or compressed files, and images without a caption.
    """

    def __init__(self, path: str, caption_column: str | None = "text") -> None:
        self.files = expand(path)
        self.names: list[str] = []
        self.captions, self.members = [], []
        for number, file in enumerate(self.files):
            for key, parts in _samples(number, file):
                image = next((parts[kind] for kind in IMAGES if kind in parts), None)
                if image is not None:
                    self.names.append(f"{file.name}:{key}")
                    self.members.append(image)
                    self.captions.append("" if caption_column is None else self._caption(parts, caption_column))
        if not self.members:
            raise InputError(
                f"expected members such as key.jpg ({', '.join(IMAGES)}) in {path!r}, got none; fix --data.path"
            )

    def _caption(self, parts: dict[str, Member], column: str) -> str:
        name = self.names[-1]
        try:
            found = json.loads(self._read(parts["json"])) if "json" in parts else {}
            fields = found if isinstance(found, dict) else {}
            text = next((self._read(parts[kind]).decode("utf-8-sig") for kind in TEXTS[:2] if kind in parts), None)
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
            raise InputError(
                f"expected UTF-8 text or JSON beside {name!r}, got: {error}; write the shard again"
            ) from error
        caption = fields.get(column, fields.get("caption") if text is None else text)
        if not isinstance(caption, str):
            raise InputError(
                f"expected a caption beside {name!r}, got {'none' if caption is None else repr(caption)}; give each image a "
                f"member key.txt, or key.json with the field {column!r} (--data.caption_column; none: no captions)"
            )
        return " ".join(caption.split())

    def _read(self, member: Member) -> bytes:
        with self.files[member.shard].open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def name(self, index: int) -> str:
        return self.names[index]

    def data(self, index: int) -> bytes:
        return self._read(self.members[index])

    def fingerprint(self) -> str:
        stats = (f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in self.files)
        return str(digest(self.names, self.captions, stats).hexdigest())


def expand(path: str) -> list[Path]:
    """The shards that a folder, a file, "{000..003}" or a glob names, in order; InputError where one is missing."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = sorted(folder / name for name in visible(folder) if name.endswith(".tar"))
    elif folder.is_file():
        files = [folder]
    elif RANGE.search(path):
        files = [Path(name) for name in _braces(str(folder))]
    else:
        files = sorted(Path(name) for name in glob.glob(str(folder), recursive=True))  # noqa: PTH207
    missing = [str(f) for f in files if not f.is_file()]
    if missing or not files:
        found = f"no file {missing[0]!r} ({len(missing)} missing)" if missing else "none"
        raise InputError(f"expected .tar shards at {path!r}, got {found}; fix --data.path")
    return files


def _braces(pattern: str) -> Iterator[str]:
    """All names that {a..b}, once or several times, stands for; numbers are as wide as a."""
    texts = RANGE.split(pattern)[::3]
    ranges = [[f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] for low, high in RANGE.findall(pattern)]
    for numbers in itertools.product(*ranges):
        yield "".join(itertools.chain(*zip(texts, (*numbers, ""), strict=True)))


def _samples(number: int, file: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, its members by extension) of one shard, in the order in which keys first occur."""
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isreg() and not any(map(hidden, name.split("/"))):
                    place, slash, last = name.rpartition("/")
                    stem, _, kind = last.partition(".")
                    parts = found.setdefault(f"{place}{slash}{stem}", {})
                    parts[kind.lower()] = Member(number, member.offset_data, member.size)
            end = tar.offset
        with file.open("rb") as raw:  # tarfile takes damaged headers for the end, which is a block of zeros
            raw.seek(end)
            if raw.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header at byte {end}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"expected an uncompressed tar file at {str(file)!r}, got: {error}; unpack or write this shard again"
        ) from error
    yield from found.items()
