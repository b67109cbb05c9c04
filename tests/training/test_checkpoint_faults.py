import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.training import checkpoint
from stepdistill.training.checkpoint import CheckpointStore

EXACT = {"rtol": 0, "atol": 0}


def payload(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "student": {"w": torch.full((7, 3), float(step)), "half": torch.full((5,), step / 3, dtype=torch.bfloat16)},
        "optimizer": {"0.step": torch.tensor(float(step))},
    }


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, payload(step), {"step": step, "round": None})


def assert_whole(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step
    assert found.state == {"step": step, "round": None}
    for name, tensors in payload(step).items():
        assert_close(found.tensors(name), tensors, **EXACT)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


# A full disk


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("target", ["save_file", "_sync", "_sha256", "json.dumps", "rename"])
def test_a_failing_disk_leaves_the_older_checkpoints(store, monkeypatch, target, same_step):
    save(store, 1, 2)
    calls = {"n": 0}
    owner, name = {"json.dumps": (Path, "write_text"), "rename": (Path, "rename")}.get(target, (checkpoint, target))
    real = getattr(owner, name)
    # fails at the n-th call, for every n up to the commit; afterwards the disk is well again
    for n in range(1, 12):
        calls["n"] = 0

        def failing(*args, n=n, **kwargs):
            calls["n"] += 1
            if calls["n"] == n:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        try:
            save(store, 2 if same_step else 3)
        except InputError as error:
            said = str(error)
        else:
            said = "No space left, but only for what comes after the commit"
        finally:
            monkeypatch.setattr(owner, name, real)
        assert "No space left" in said
        if calls["n"] < n:
            break
        assert not [name for name in os.listdir(store.folder) if name == ".saving-2" or name == ".saving-3"]
        assert (store.folder / "2").is_dir()  # also when the rename that replaces it failed
        assert {1, 2} <= set(store.steps()) or store.find().step == 3
        assert_whole(store.find(), store.steps()[-1])
        shutil.rmtree(store.folder)
        save(store, 1, 2)
    assert n > 1  # it was called, so it failed at least once


@contextmanager
def no_file_over(size):
    """A disk that takes no more than so many bytes of a file."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits")
def test_a_real_write_error(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"student": {"w": torch.zeros(10)}}, {})
    with no_file_over(100_000), pytest.raises(InputError, match=r"File too large[\s\S]*untouched \(1\)"):
        store.save(2, {"student": {"w": torch.zeros(100_000)}}, {})
    assert os.listdir(tmp_path) == ["1"]


# kill -9

KILLER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # slow, and what a killed process wrote is in the page cache anyway
    from stepdistill.training import checkpoint
    from stepdistill.training.checkpoint import CheckpointStore

    def save(store, step):
        w = torch.full((20_000,), float(step))
        store.save(step, {"student": {"w": w}, "critic": {"w": w}}, {"step": step})

    def in_child(work):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        return child

    def counted(owner, name, deadly, count):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            for moment in ("before", "after"):
                count[0] += 1
                if count[0] == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "before":
                    result = real(*args, **kwargs)
            return result
        setattr(owner, name, call)

    def die_at(store, step, deadly):
        count = [0]
        for owner, name in ((checkpoint, "_sync"), (checkpoint, "save_file"), (Path, "rename"), (Path, "write_text"),
                            (checkpoint.shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):
            counted(owner, name, deadly, count)
        save(store, step)

    root = Path(sys.argv[1])
    for step in (2, 3):  # 2 replaces the newest, 3 is new and rotates
        for deadly in range(1, 200):
            folder = root / f"point-{step}-{deadly}"
            store = CheckpointStore(folder)
            save(store, 1)
            save(store, 2)
            _, status = os.waitpid(in_child(lambda: die_at(store, step, deadly)), 0)
            if not os.WIFSIGNALED(status):
                break
    generator = random.Random(0)
    for trial in range(8):
        store = CheckpointStore(root / f"random-{trial}")
        save(store, 0)
        child = in_child(lambda: [save(store, step) for step in range(1, 100_000)])
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def test_kill_9_at_any_moment_leaves_a_good_checkpoint(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    folders = sorted(tmp_path.iterdir())
    points = {step: [f for f in folders if f.name.startswith(f"point-{step}")] for step in (2, 3)}
    assert len(points[2]) > 25 and len(points[3]) > 25  # the moments tried
    reached = set()
    for folder in folders:
        store = CheckpointStore(folder)
        found = store.find(strict=True)  # not one of them is even damaged
        assert found is not None, folder
        assert found.state == {"step": found.step}
        for name in ("student", "critic"):
            assert_close(found.tensors(name)["w"], torch.full((20_000,), float(found.step)), **EXACT)
        if folder.name.startswith("point"):
            assert found.step in (2, 3)  # never back to 1
            reached.add(found.step)
        save(store, found.step + 1)  # the next save cleans up
        assert all(name.isdecimal() for name in os.listdir(folder)) and len(store.steps()) == 2
        assert_whole(store.find(strict=True), found.step + 1)
    assert reached == {2, 3} and not caplog.records
