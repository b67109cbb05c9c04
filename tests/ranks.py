"""Several processes as torchrun starts them, but imports are made once: `python ranks.py COUNT MODULES SCRIPT ARGUMENTS...`.

MODULES, with commas between them, are imported before the processes are forked: they take seconds, and torchrun itself takes
two. One alone is told nothing. What a test of torchrun itself is about is run under torchrun.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TRAINING = ("accelerate", "stepdistill.training.trainer", "torch._dynamo")  # an optimizer imports the last


def run_ranks(
    script: str,
    arguments: Sequence[object],
    modules: Sequence[str] = TRAINING,
    count: int = 2,
    torchrun: bool = False,
) -> None:
    """Runs a script of tests/ in `count` processes on the CPU, and fails where one of them does."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    launcher = [str(TESTS / "ranks.py"), str(count), ",".join(modules)]
    if torchrun or sys.platform != "linux":  # elsewhere a process that has imported so much may not fork
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [sys.executable, *launcher, str(TESTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def become(rank: int, count: int, port: int) -> None:
    """In a forked process: what torchrun tells one in its environment, once the store's port comes through the pipe."""
    store = os.read(port, 16).decode()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=store, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="ranks",
    )  # fmt: skip


def wait(ranks: list[int]) -> bool:
    """Whether all ended well; one that doesn't ends the others, which would wait for it."""
    while ranks:
        done, status = os.wait()
        ranks.remove(done)
        if status:
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
            return False
    return True


def main() -> None:
    count, modules, script, *arguments = sys.argv[1:]
    for module in modules.split(","):
        importlib.import_module(module)
    from torch.distributed import TCPStore

    sys.argv = [script, *arguments]
    if int(count) == 1:
        runpy.run_path(script, run_name="__main__")
        return
    ranks, pipes = [], [os.pipe() for _ in range(int(count))]
    for rank, (port, _) in enumerate(pipes):
        ranks.append(os.fork())
        if not ranks[-1]:
            become(rank, int(count), port)
            runpy.run_path(script, run_name="__main__")
            return
    # the store has threads, and so comes after the forks
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, port in pipes:
        os.write(port, str(store.port).encode())
    sys.exit(0 if wait(ranks) else 1)


if __name__ == "__main__":
    main()
