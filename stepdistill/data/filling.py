"""Filling a cache: shards are shared out by rank, made one after the other, and waited for."""

from __future__ import annotations

import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from .cache import Entry, ShardStore


class Made(NamedTuple):
    """One shard's tensors, [rows, ...] each, and the images that could not be read, "name (reason)"."""

    tensors: dict[str, Tensor]
    rows: int
    bad: Sequence[str] = ()


class Maker(ABC):
    """Makes the shards of one kind, each from a range of items.

    Attributes:
        kind: "latents" or "prompts", the beginning of the shards' names.
        what: what progress calls the items.
        items: how many there are.
        shard: items a shard.
        bad: of the shards that are known so far; :func:`fill` keeps it up.
    """

    kind: str
    what: str
    items: int
    shard: int
    bad: list[str]

    def names(self) -> list[str]:
        """The names of all shards, in order."""
        return [f"{self.kind}-{i:05d}" for i in range(-(-self.items // self.shard))]

    def inside(self, number: int) -> range:
        """The items of one shard."""
        return range(number * self.shard, min((number + 1) * self.shard, self.items))

    @abstractmethod
    def make(self, items: range) -> Made:
        """The shard of these items. Raises InputError."""


def fill(
    store: ShardStore,
    makers: Sequence[Maker],
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> dict[str, list[Entry]]:
    """The entries of all shards by kind, those that are missing made by the process whose turn it is.

    Every process makes each `world`-th shard and then looks for those of the others: that may take hours, and barriers give up
    after some minutes, so `wait` stands only before (damage is known to all) and after (all see the same).
    """
    if rank == 0:
        store.begin()
    todo: list[list[tuple[Maker, int, str]]] = []
    for maker in makers:
        entries = {name: store.find(name) for name in maker.names()[rank::world]}
        maker.bad.extend(bad for entry in entries.values() if entry is not None for bad in entry.bad)
        todo.append([(maker, n, s) for n, s in enumerate(maker.names()) if s in entries and entries[s] is None])
    wait()
    if not store.has_begun():
        raise InputError(
            f"expected the main process's {store.what} in {str(store.folder)!r}, got none; give {store.flag} a folder that all "
            "nodes share"
        )
    report = _reporter(progress and rank == 0)
    for job in (job for jobs in todo for job in jobs[:1]):  # one of each kind tells how large the cache will be
        _make(store, *job, rank, world, report)
    if any(todo):
        _check_space(store, makers)
    for job in (job for jobs in todo for job in jobs[1:]):
        _make(store, *job, rank, world, report)
    _await(store, [name for maker in makers for name in maker.names()])
    wait()
    return {maker.kind: [_entry(store, name) for name in maker.names()] for maker in makers}


def _make(
    store: ShardStore, maker: Maker, number: int, name: str, rank: int, world: int, report: Callable[[str, int, int], None]
) -> None:  # fmt: skip
    made = maker.make(maker.inside(number))
    store.write(name, made.tensors, made.rows, made.bad)
    maker.bad.extend(made.bad)
    own = [maker.inside(n) for n in range(rank, len(maker.names()), world)]
    report(maker.what, sum(len(r) for r in own if r.start <= number * maker.shard), sum(map(len, own)))


def _check_space(store: ShardStore, makers: Sequence[Maker]) -> None:
    """InputError where what is missing will not fit on the disk, by the size of the shards that are there."""
    needed = 0.0
    for maker in makers:
        names = maker.names()
        here = {n for n, name in enumerate(names) if store.has(name)}
        if here:
            number = min(here)
            per_item = store.path(names[number]).stat().st_size / len(maker.inside(number))
            needed += per_item * sum(len(maker.inside(n)) for n in range(len(names)) if n not in here)
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise InputError(
            f"expected {needed / 2**30:.1f} GiB free for the rest of the {store.what} in {str(store.folder)!r}, got "
            f"{free / 2**30:.1f} GiB; free some space, or give {store.flag} a folder on a larger disk"
        )


def _await(store: ShardStore, names: Sequence[str]) -> None:
    for name in names:
        while not store.has(name):
            time.sleep(0.2)


def _entry(store: ShardStore, name: str) -> Entry:
    entry = store.find(name)
    if entry is None:
        raise InputError(
            f"expected {str(store.path(name))!r}, which was finished, got it changed or gone; see whether something else works "
            "in this folder, and start again"
        )
    return entry


def _reporter(progress: bool) -> Callable[[str, int, int], None]:
    """(what, done, of) -> a line on stderr, overwritten on a terminal."""
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")

    def report(what: str, done: int, of: int) -> None:
        if progress:
            print(
                f"{start}caching {what}: {done} of {of}", end="\n" if done == of else end, file=sys.stderr, flush=True
            )

    return report
