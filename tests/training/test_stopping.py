"""SIGTERM and SIGINT in one process: at once, after a step, in a callback. Processes and launchers: test_launchers.py."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.testing import assert_close
from toys import EXACT, Ladder, Numbers, Regression, options, rows, same, stopping_after, train, weights

from stepdistill.training import stopping
from stepdistill.training.stopping import Stop
from stepdistill.training.trainer import Trainer

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


# -- the handlers -----------------------------------------------------------------------------------------------------


@BOTH
def test_outside_of_a_fit_the_process_leaves_at_once(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    Stop()
    with pytest.raises(SystemExit) as left:
        kill(number)
    assert left.value.code == code
    assert capfd.readouterr().err == f"{signal.Signals(number).name}: leaving at once\n"


def deferred(stop: Stop, *actions: Callable[[], object]) -> int:
    """The exit code of a deferred part that does these things."""
    try:
        with stop.deferred():
            for action in actions:
                action()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@BOTH
def test_a_deferred_signal_waits_to_be_asked_for(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    stop, trail = Stop(), []
    assert deferred(stop, lambda: kill(number), lambda: trail.append(stop.number)) == code
    assert trail == [number]
    name = signal.Signals(number).name
    assert name in (said := capfd.readouterr().err).splitlines()[0] and f"stopped by {name}" in said.splitlines()[1]
    assert ("once more" in said) == (number == signal.SIGINT)


def test_only_the_process_that_speaks_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert deferred(Stop(speaks=False), lambda: kill(signal.SIGTERM)) == 143
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("first", stopping.SIGNALS)
def test_a_second_sigint_gives_up_unless_it_is_the_first_passed_on(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, now, came = Stop(), [100.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])

    def signals() -> None:
        for at, number in ((0, first), (1.9, signal.SIGINT), (60, signal.SIGTERM), (61, signal.SIGINT)):
            now[0] = 100.0 + at
            came.append(at)
            kill(number)

    with pytest.raises(KeyboardInterrupt), stop.deferred():
        signals()
    assert came == [0, 1.9, 60, 61]


def test_a_repeated_sigterm_on_the_way_out_is_no_second_exit() -> None:
    Stop()
    trail = []

    def leave() -> None:
        try:
            kill(signal.SIGTERM)
        finally:
            kill(signal.SIGTERM)
            trail.append("cleaned up")

    with pytest.raises(SystemExit):
        leave()
    assert trail == ["cleaned up"]


def test_a_callback_is_broken_off_whatever_it_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, trail, now = Stop(), [], [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])

    def callback() -> None:
        try:
            kill(signal.SIGTERM)
            trail.append("went on")
        except Exception:
            trail.append("caught")
        finally:
            now[0] += 60.0  # its own cleaning up takes its time, and is not broken off
            kill(signal.SIGTERM)
            trail.append("cleaned up")

    again = lambda: stop.breakable(lambda: trail.append("called in vain"))  # noqa: E731
    assert deferred(stop, lambda: stop.breakable(callback), lambda: trail.append("after"), again) == 143
    assert trail == ["cleaned up", "after"]


def test_a_callback_that_swallows_the_signal_or_fails_loses_nothing() -> None:
    stop = Stop()

    def swallows() -> None:
        try:
            kill(signal.SIGTERM)
        except BaseException:
            raise KeyError("its own") from None

    with pytest.raises(KeyError), stop.deferred():
        stop.breakable(swallows)
    assert stop.number == signal.SIGTERM
    with pytest.raises(ZeroDivisionError):
        Stop().breakable(lambda: 1 / 0)


def test_the_part_where_nothing_can_be_lost() -> None:
    trail: list[str] = []
    for before in (True, False):
        stop = Stop()

        def part(stop: Stop = stop) -> None:
            trail.append("deferred")
            with stop.at_once():
                kill(signal.SIGTERM)
                trail.append("not reached")

        assert deferred(stop, *[lambda: kill(signal.SIGTERM)] * before, part) == 143
    assert trail == ["deferred"] * 2
    stop = Stop()

    def nothing() -> None:
        with stop.at_once():
            pass

    assert deferred(stop, nothing, lambda: kill(signal.SIGTERM), lambda: trail.append("deferred again")) == 143
    assert trail[-1] == "deferred again"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    first, second = Stop(), Stop()
    first.close()  # no longer its signals
    with pytest.raises(SystemExit):
        kill(signal.SIGTERM)
    assert second.number == signal.SIGTERM and first.number == 0
    with first.deferred():  # its fit takes them over
        pass
    second.close()
    assert Stop._installed is first
    first.close()
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


def test_a_trainer_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    trainer = Trainer(options(), tmp_path)
    trainer.fit(Regression(), Numbers())
    assert signal.getsignal(signal.SIGTERM) != before[0]
    trainer.close()
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    """A shell's background job has SIGINT ignored: a Ctrl-C is not meant for it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Stop()
        kill(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_leave_the_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=Stop)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before and Stop._installed is None


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_worker_dies_of_sigterm() -> None:
    """As a data loader's worker, which its parent ends so in the middle of a fit."""
    script = """
        import os, signal, time
        from stepdistill.training.stopping import Stop
        with Stop().deferred():
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(write, b"x")
                time.sleep(30)
                os._exit(0)
            os.read(read, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "-15\n"


@pytest.mark.parametrize("variable", stopping.LAUNCHERS)
def test_the_launcher_is_watched_where_there_is_one(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def watchers() -> int:
        return sum("launcher" in thread.name for thread in threading.enumerate())

    for name in stopping.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    Stop().close()
    assert watchers() == 0  # a run may outlive its terminal
    monkeypatch.setenv(variable, "x")
    stop = Stop()
    assert watchers() == 1
    stop.close()
    for thread in threading.enumerate():
        if "launcher" in thread.name:
            thread.join(timeout=5.0)
    assert watchers() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_launcher_that_is_gone_counts_as_sigterm() -> None:
    script = """
        import os, time
        from stepdistill.training.stopping import Stop
        read, write = os.pipe()
        if os.fork():
            os.read(read, 1)
            os._exit(0)
        try:
            stop = Stop()
            os.write(write, b"x")
            time.sleep(30)
        except SystemExit as left:
            print(left.code)
    """
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "143\n"
    assert done.stderr.splitlines() == ["the launcher is gone, which counts as SIGTERM", "SIGTERM: leaving at once"]


# -- a fit ------------------------------------------------------------------------------------------------------------

RUN = {"max_train_steps": 6, "ema_decay": 0.9, "validation_steps": 2}


def stopped(
    folder: Path, code: int, method: Regression | Ladder | None = None, **callbacks: Callable[[int], None]
) -> None:
    with pytest.raises(SystemExit) as left:
        Trainer(options(**RUN), folder).fit(Regression() if method is None else method, Numbers(), **callbacks)
    assert left.value.code == code


def resumed_is_whole(folder: Path, make: Callable[[], Regression] = Regression) -> None:
    method = train(folder, make(), resume_from_checkpoint="latest", **RUN)
    whole = train(folder.parent / "whole", make(), **RUN)
    assert_close(weights(method), weights(whole), **EXACT)
    same(folder, folder.parent / "whole")


@BOTH
def test_the_step_is_finished_and_saved(tmp_path: Path, number: int, code: int, capfd: pytest.CaptureFixture) -> None:
    method = Regression()
    with stopping_after(method, 3, lambda: kill(number)):
        stopped(tmp_path / "run", code, method)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert f"stopped by {signal.Signals(number).name}; step 3 is saved" in capfd.readouterr().err
    resumed_is_whole(tmp_path / "run")


def test_validation_is_broken_off_and_the_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    trail: list[int] = []

    def on_validate(step: int) -> None:
        trail.append(step)
        if step == 4:
            kill(signal.SIGTERM)
            trail.append(-1)

    stopped(tmp_path / "run", 143, on_validate=on_validate)
    assert trail == [2, 4] and (tmp_path / "run" / "checkpoints" / "4").is_dir()
    resumed_is_whole(tmp_path / "run")


def test_the_end_of_a_round_is_broken_off_and_told_again(tmp_path: Path) -> None:
    trail: list[int] = []

    def on_round(number: int) -> None:
        trail.append(number)
        if number == 1:
            kill(signal.SIGINT)
            trail.append(-1)

    stopped(tmp_path / "run", 130, Ladder(), on_round=on_round)
    assert trail == [0, 1]
    trainer = Trainer(options(resume_from_checkpoint="latest", **RUN), tmp_path / "run")
    trainer.fit(Ladder(), Numbers(), on_round=trail.append)
    assert trail == [0, 1, 1, 2]
    resumed_is_whole(tmp_path / "run", Ladder)


def test_a_signal_in_the_last_step_of_a_round_comes_before_its_callback(tmp_path: Path) -> None:
    method, trail = Regression(), []
    with stopping_after(method, 6, lambda: kill(signal.SIGTERM)):
        stopped(tmp_path / "run", 143, method, on_round=trail.append)
    assert trail == []
    resumed_is_whole(tmp_path / "run")


def test_after_a_fit_it_leaves_at_once(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(SystemExit) as left:
        kill(signal.SIGTERM)
    assert left.value.code == 143
