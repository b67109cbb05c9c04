"""The end of a run by a signal: at once where nothing can be lost, after the step and a checkpoint in the middle of a fit.

Schedulers and launchers send SIGTERM and kill some 30 seconds later; a terminal sends SIGINT to the whole process group, and
launchers pass it on once more. The exit code is 128 + the signal's number, as a shell has it: 143 or 130.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, ClassVar

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 2.0  # seconds in which a repeated signal is the same one, passed on by a launcher
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")  # torchrun and `accelerate launch` alone set these


class _BrokenOff(BaseException):
    """Leaves a callback in the middle. No Exception: the callback's own handlers must not stop it."""


class Stop:
    """What SIGTERM and SIGINT do to this process from now on; in other threads than the main one, nothing new.

    - Outside of :meth:`deferred` the process exits at once: what has been cached, exported or saved stays.
    - Within it the signal waits until :meth:`agreed` is asked for it, and breaks off a :meth:`breakable` callback.
    - A second SIGINT, more than two seconds after the first signal, gives up with KeyboardInterrupt. A second SIGTERM adds
      nothing.
    - A launcher that has vanished counts as SIGTERM: one that is killed leaves its processes behind, which would go on
      computing for nobody. What was not started by a launcher may outlive its parent, as under nohup.

    Args:
        speaks: whether this process says what happens, on stderr.
    """

    _installed: ClassVar[Stop | None] = None  # handlers belong to the process, so there is one at a time

    def __init__(self, speaks: bool = True) -> None:
        self.number = 0  # of the first signal that came, or 0
        self._speaks, self._since = speaks, 0.0
        self._deferred = self._breakable = False
        self._process, self._parent = os.getpid(), os.getppid()
        self._previous: dict[signal.Signals, Any] = {}
        self._closed = threading.Event()
        self.install()

    # -- handlers -----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Takes the signals over, from another Stop too; those that are ignored, as SIGINT under nohup, stay ignored."""
        if Stop._installed is self or threading.current_thread() is not threading.main_thread():
            return
        if Stop._installed is not None:
            Stop._installed.close()
        Stop._installed = self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        if any(name in os.environ for name in LAUNCHERS):
            self._closed.clear()
            threading.Thread(target=self._watch_parent, name="watches the launcher", daemon=True).start()

    def close(self) -> None:
        """Puts the previous handlers back."""
        if Stop._installed is not self:
            return
        Stop._installed = None
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker dies of it as if we were not there
            signal.signal(number, self._previous.get(signal.Signals(number)) or signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.number:
            self._take(number)
        elif time.monotonic() - self._since < GRACE:
            return
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred:
            self.say(f"{_name(number)}: leaving at once")
            raise SystemExit(128 + number)
        if self._breakable:
            self._breakable = False
            raise _BrokenOff

    def _take(self, number: int) -> None:
        self.number, self._since = number, time.monotonic()
        if self._deferred:
            again = "; once more gives up without it" if number == signal.SIGINT else ""
            self.say(f"{_name(number)}: stopping after this step, with a checkpoint{again}")

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            if self._closed.wait(1.0):
                return
        self.say("the launcher is gone, which counts as SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    # -- what a fit asks ----------------------------------------------------------------------------------------------

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a signal waits; one that nobody has asked for by its end ends the process there."""
        self.install()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.leave("the fit is finished and saved")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of :meth:`deferred` in which there is nothing to lose."""
        self._deferred = False
        try:
            self.leave("all is saved")
            yield
        finally:
            self._deferred = True

    def breakable(self, call: Callable[[], object]) -> None:
        """Calls it; a signal breaks it off in the middle, and one that has come already keeps it from being called."""
        if self.number:
            return
        try:
            self._breakable = True
            try:
                call()
            finally:
                self._breakable = False
        except _BrokenOff:
            pass

    def agreed(self, accelerator: Any) -> bool:
        """Whether a signal has come to any process: the same answer on all of them, which then hold the same number."""
        if accelerator.num_processes == 1:
            return self.number != 0
        came = torch.tensor([float(self.number == number) for number in SIGNALS], device=accelerator.device)
        counts = accelerator.reduce(came, "sum").tolist()
        number = next((number for number, count in zip(SIGNALS, counts, strict=True) if count), 0)
        if number:
            self.number, self._since = number, time.monotonic()
        return number != 0  # one that came here in the meantime is for the next step

    def leave(self, saved: str) -> None:
        """Ends the process if a signal has come."""
        if self.number:
            self.say(f"stopped by {_name(self.number)}; {saved}")
            raise SystemExit(128 + self.number)

    def say(self, line: str) -> None:
        """One line on stderr. Not through sys.stderr: a handler may have interrupted a write to it."""
        if self._speaks:
            with suppress(OSError):  # the terminal may be what has gone
                os.write(2, f"{line}\n".encode())


def _name(number: int) -> str:
    return signal.Signals(number).name
