"""Signals to real processes, alone and under torchrun and `accelerate launch`: what schedulers and terminals do to a run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from toys import rows, same, saved

from stepdistill.training.stopping import LAUNCHERS

TESTS = Path(__file__).resolve().parent.parent
PLAIN: list[str] = []
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

Kill = Callable[[subprocess.Popen[str], int], None]


def to_process(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)


def to_group(process: subprocess.Popen[str], number: int) -> None:
    os.killpg(process.pid, number)


@contextmanager
def started(launcher: list[str], mode: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own that runs `mode`; killed at the end with all that is left of it."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    environment = {
        **clean,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *launcher, str(TESTS / "toy_process.py"), mode, str(folder)]
    errors = (folder.parent / f"{folder.name}.{mode}.err").open("w+")
    process = subprocess.Popen(
        command, env=environment, stdout=errors, stderr=errors, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        errors.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finished(launcher: list[str], mode: str, folder: Path) -> None:
    with started(launcher, mode, folder) as process:
        assert process.wait(timeout=120) == 0, told(folder, mode)


def stopped(launcher: list[str], mode: str, folder: Path, number: int, kill: Kill) -> tuple[int, float]:
    """(exit code, seconds) of a run that gets a signal once it is well under way."""
    with started(launcher, mode, folder) as process:
        until((folder / "ready").exists, process)
        if mode == "dawdle":
            until(lambda: len(rows(folder)) >= 3, process)
        began = time.monotonic()
        kill(process, number)
        code = process.wait(timeout=60)
        until(lambda: alone(process), process)  # a child that the launcher left behind
        return code, time.monotonic() - began


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {condition}; exit code {process.poll()}")


def alone(process: subprocess.Popen[str]) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def told(folder: Path, mode: str = "dawdle") -> str:
    return (folder.parent / f"{folder.name}.{mode}.err").read_text()


def goes_on(launcher: list[str], folder: Path, whole: Path) -> None:
    """It was stopped in the middle, each step told and saved, and ends as one that was not."""
    stopped_at = saved(folder)[1], [row["step"] for row in rows(folder)]
    assert stopped_at[1] == list(range(1, len(stopped_at[1]) + 1)) and 3 <= len(stopped_at[1]) < 20
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [str(len(stopped_at[1]))]
    finished(launcher, "hurry", folder)
    same(folder, whole)


@pytest.mark.parametrize(("kill", "number", "code"), [
    (to_process, signal.SIGTERM, 143), (to_group, signal.SIGTERM, 143), (to_group, signal.SIGINT, 130),
])  # fmt: skip
def test_one_process(tmp_path: Path, kill: Kill, number: int, code: int) -> None:
    assert stopped(PLAIN, "dawdle", tmp_path / "run", number, kill)[0] == code
    assert re.search(rf"stopped by {signal.Signals(number).name}; step \d+ is saved", told(tmp_path / "run"))
    finished(PLAIN, "hurry", tmp_path / "whole")
    goes_on(PLAIN, tmp_path / "run", tmp_path / "whole")


def test_a_process_whose_launcher_is_killed(tmp_path: Path) -> None:
    """SIGTERM ends `accelerate launch` and leaves its process behind, which must not go on for days."""
    code, seconds = stopped(ACCELERATE, "dawdle", tmp_path / "run", signal.SIGTERM, to_process)
    assert code == -signal.SIGTERM and seconds < 10.0
    assert "the launcher is gone" in told(tmp_path / "run") and "stopped by SIGTERM" in told(tmp_path / "run")
    finished(PLAIN, "hurry", tmp_path / "whole")
    goes_on(ACCELERATE, tmp_path / "run", tmp_path / "whole")


def test_a_plain_process_outlives_its_parent(tmp_path: Path) -> None:
    """As under nohup, when the terminal is closed."""
    launcher = ["-c", "import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[1:]]); time.sleep(60)"]
    with started(launcher, "dawdle", tmp_path / "run") as process:
        until(lambda: len(rows(tmp_path / "run")) >= 3, process)
        process.kill()
        process.wait()
        until(lambda: alone(process), process)
    assert len(rows(tmp_path / "run")) == 20


@pytest.mark.parametrize(
    ("number", "kill"), [(signal.SIGTERM, to_process), (signal.SIGINT, to_process), (signal.SIGINT, to_group)]
)
def test_two_processes_under_torchrun(tmp_path: Path, number: int, kill: Kill) -> None:
    """torchrun passes the signal on, after the terminal has sent it to the whole group, and both ranks save one step."""
    _, seconds = stopped(TORCHRUN, "dawdle", tmp_path / "run", number, kill)
    assert seconds < 25.0, "before torchrun would kill"
    assert re.search(rf"stopped by {signal.Signals(number).name}; step \d+ is saved", told(tmp_path / "run"))
    finished(TORCHRUN, "hurry", tmp_path / "whole")
    goes_on(TORCHRUN, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("launcher", [PLAIN, TORCHRUN])
def test_a_validation_is_broken_off_in_time(tmp_path: Path, launcher: list[str]) -> None:
    code, seconds = stopped(launcher, "validate", tmp_path / "run", signal.SIGTERM, to_process)
    assert seconds < 25.0 and (tmp_path / "run" / "checkpoints" / "5").is_dir()
    assert code == (143 if launcher is PLAIN else code) and "step 5 is saved" in told(tmp_path / "run", "validate")


@pytest.mark.parametrize("launcher", [PLAIN, TORCHRUN])
def test_what_comes_before_the_fit_is_left_at_once(tmp_path: Path, launcher: list[str]) -> None:
    code, seconds = stopped(launcher, "prepare", tmp_path / "run", signal.SIGTERM, to_process)
    assert seconds < 10.0 and "SIGTERM: leaving at once" in told(tmp_path / "run", "prepare")
    assert code == (143 if launcher is PLAIN else code)
