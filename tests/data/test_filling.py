import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from stepdistill.data.cache import Entry, ShardStore
from stepdistill.data.filling import Made, Maker, fill
from stepdistill.errors import InputError


class Counting(Maker):
    """Rows that are their items' numbers; item 7 is bad."""

    what, shard = "items", 3

    def __init__(self, kind: str, items: int, width: int = 1) -> None:
        self.kind, self.items, self.width = kind, items, width
        self.bad: list[str] = []
        self.made: list[int] = []

    def make(self, items: range) -> Made:
        self.made.append(items.start // self.shard)
        good = [i for i in items if i != 7]
        return Made({"x": torch.tensor(good).repeat(self.width, 1)}, len(good), ["7 (bad)"] * (7 in items))


def makers() -> tuple[Counting, Counting]:
    return Counting("latents", 11), Counting("prompts", 4)


def store_at(folder: Path) -> ShardStore:
    return ShardStore(folder, {})


def test_shards_are_made_once_and_the_first_of_each_kind_first(tmp_path: Path):
    latents, prompts = makers()
    order: list[str] = []
    for maker in (latents, prompts):
        original = maker.make
        maker.make = lambda items, m=maker, f=original: order.append(m.kind) or f(items)  # type: ignore[method-assign]
    entries = fill(store_at(tmp_path), (latents, prompts), progress=False)
    assert order == ["latents", "prompts", "latents", "latents", "latents", "prompts"]
    assert [e.rows for e in entries["latents"]] == [3, 3, 2, 2] and [e.rows for e in entries["prompts"]] == [3, 1]
    assert [e.bad for e in entries["latents"]] == [(), (), ("7 (bad)",), ()]
    again = makers()
    assert fill(store_at(tmp_path), again, progress=False) == entries
    assert [m.made for m in again] == [[], []]
    assert again[0].bad == ["7 (bad)"]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_shards_and_all_see_the_same(tmp_path: Path, world: int):
    whole = fill(store_at(tmp_path / "whole"), makers(), progress=False)
    barrier = threading.Barrier(world, timeout=20)
    own = [makers() for _ in range(world)]
    found: list[dict[str, list[Entry]]] = [{} for _ in range(world)]

    def process(rank: int) -> None:
        found[rank] = fill(store_at(tmp_path / "cache"), own[rank], rank, world, barrier.wait, progress=False)  # type: ignore[arg-type]

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [m[0].made for m in own] == [list(range(rank, 4, world)) for rank in range(world)]
    assert all(each == found[0] for each in found)
    for kind, entries in whole.items():
        assert [e.rows for e in found[0][kind]] == [e.rows for e in entries]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "cache" / file.name).read_bytes() == file.read_bytes()


def test_damage_is_repaired_by_the_process_whose_shard_it_is_before_others_use_it(tmp_path: Path):
    first = fill(store_at(tmp_path), makers(), progress=False)
    path = store_at(tmp_path).path("latents-00001")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    barrier = threading.Barrier(2, timeout=20)
    own = [makers() for _ in range(2)]
    slow = own[1][0].make
    own[1][0].make = lambda items: time.sleep(0.5) or slow(items)  # type: ignore[method-assign]
    seen: list[bytes] = []
    there: list[bool] = []

    def process(rank: int) -> None:
        def wait() -> None:  # barriers give up after some minutes: nobody may stand in one while another makes shards
            there.append(store_at(tmp_path).has("latents-00001"))
            barrier.wait()

        entries = fill(store_at(tmp_path), own[rank], rank, 2, wait, progress=False)
        assert [e.sha256 for e in entries["latents"]] == [e.sha256 for e in first["latents"]]
        seen.append(path.read_bytes())

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [whole, whole]
    assert there[2:] == [True, True]
    assert (own[0][0].made, own[1][0].made) == ([], [1])


def test_another_process_that_cannot_see_the_folder_says_so(tmp_path: Path):
    with pytest.raises(InputError, match=r"main process's latent cache.*--data\.cache_dir.*all nodes share"):
        fill(store_at(tmp_path / "elsewhere"), makers(), 1, 2, lambda: None, progress=False)


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(0, 0, free))


def test_a_disk_too_small_is_said_after_the_first_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    latents, prompts = Counting("latents", 3000, width=1000), Counting("prompts", 30, width=1000)
    size = 3 * 8 * 1000
    disk(monkeypatch, 1000 * size)  # some bytes of header a shard are too much
    with pytest.raises(InputError, match=r"GiB free for the rest of the latent cache in .*--data\.cache_dir"):
        fill(store_at(tmp_path), (latents, prompts), progress=False)
    assert (latents.made, prompts.made) == ([0], [0])
    small = Counting("latents", 30, width=1000), Counting("prompts", 30, width=1000)
    disk(monkeypatch, 2 * 9 * (size + 200))
    fill(store_at(tmp_path / "b"), small, progress=False)
    disk(monkeypatch, 0)
    fill(store_at(tmp_path / "b"), small, progress=False)  # there is nothing left to write
    assert [len(m.made) for m in small] == [10, 10]


SLOW = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_filling
    from stepdistill.data import cache
    flush = cache._flush
    def slow(path):
        print("writing", path.name, flush=True)
        flush(path)
        import time; time.sleep(0.02)
    cache._flush = slow
    test_filling.fill(test_filling.store_at(Path({folder!r})), test_filling.makers(), progress=False)
"""


@pytest.mark.parametrize("lines", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 8, 11))])
def test_kill_9_leaves_a_cache_that_the_next_start_completes(tmp_path: Path, lines: int):
    whole = fill(store_at(tmp_path / "whole"), makers(), progress=False)
    code = textwrap.dedent(SLOW).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline().startswith("writing")
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.json")}
    again = makers()
    entries = fill(store_at(tmp_path / "cache"), again, progress=False)
    assert {k: [e.sha256 for e in v] for k, v in entries.items()} == {
        k: [e.sha256 for e in v] for k, v in whole.items()
    }
    listed = [name for name in before if name != "about.json"]
    assert sum(len(m.made) for m in again) == 6 - len(listed)
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == before[name] for name in listed)
