"""What a run tells about itself while it trains: metrics.jsonl, a progress bar or plain lines, and experiment trackers.

A tracker or a terminal that fails does not end a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..errors import InputError
from .config import flat_config

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # between two plain progress lines


class MetricsLog:
    """`metrics.jsonl`: one JSON object per optimizer step.

    The file is opened for each row: a step takes far longer, each row is out of this process when `write` returns, and
    there is nothing to close. NaN is written as null, infinities as "inf" and "-inf": JSON has neither.

    Args:
        path: the file; made at the first row.
        enabled: False on all processes but one.
    """

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path, self.enabled = Path(path), enabled
        self._checked = False

    def rewind(self, step: int) -> None:
        """Drops rows past `step`, which a resumed run will write again, and lines torn by a kill. Atomic.

        Kept lines keep their bytes. Rows without a "step" are kept.
        """
        if not self.enabled or not self.path.is_file():
            return
        temp = self.path.with_name(f".{self.path.name}.rewound")
        with self.path.open("rb") as old, temp.open("wb") as new:
            new.writelines(line for line in old if _is_row_until(line, step))
            new.flush()
            os.fsync(new.fileno())
        os.replace(temp, self.path)

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Appends one row."""
        if not self.enabled:
            return
        line = json.dumps({name: _legal(value) for name, value in row.items()}, allow_nan=False) + "\n"
        try:
            self._append(line)
        except OSError as error:
            raise InputError(
                f"expected to write {self.path}, got: {error}; free some space or fix the permissions, then resume from the "
                "latest checkpoint"
            ) from error

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as handle:
            if not self._checked and handle.tell() and not self._ends_a_line():
                line = "\n" + line  # a torn line must not take this row with it
            self._checked = True
            handle.write(line.encode())

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as handle:
            handle.seek(-1, os.SEEK_END)
            return handle.read(1) == b"\n"


def _is_row_until(line: bytes, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    # a whole object without its newline is torn too: the next row would land on the same line
    return isinstance(row, dict) and line.endswith(b"\n") and row.get("step", step) <= step


def _legal(value: float | int | str) -> float | int | str | None:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


class Progress:
    """A bar on a terminal; elsewhere a plain line about every ten seconds and one at the end.

    Args:
        total: the step at which the run ends.
        start: the step it starts from, when resumed.
        label: printed first.
        enabled: False on all processes but one.
        stream: where to print; stderr by default. If it goes away (a closed pipe), progress falls silent.
    """

    def __init__(
        self, total: int, start: int = 0, label: str = "", enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self.total, self.label, self.enabled, self._step = total, label, enabled, start
        self._stream = sys.stderr if stream is None else stream
        self._mean: float | None = None  # seconds a step
        self._pending = ""
        self._printed = -math.inf
        self._bar: tqdm[Any] | None = None
        if enabled and self._stream.isatty():
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(
                total=total, initial=start, desc=label or None, file=self._stream, dynamic_ncols=True, bar_format=form
            )

    def update(self, step: int, loss: float, lr: float, seconds: float) -> None:
        """Reports that `step` steps are done; `seconds` is what the last one took."""
        if not self.enabled:
            return
        # a moving mean over some 20 steps: the first ones warm up, and some pause to validate or save
        self._mean = seconds if self._mean is None else 0.95 * self._mean + 0.05 * seconds
        eta = tqdm.format_interval(self._mean * max(0, self.total - step))
        text = f"loss {loss:.4g}, lr {lr:.3g}, {self._mean:.3g} s/step, ETA {eta}"
        try:
            if self._bar is not None:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(step - self._step)
            else:
                self._pending = f"{self.label + ' ' if self.label else ''}step {step}/{self.total}: {text}"
                if step >= self.total or time.monotonic() - self._printed >= PLAIN_SECONDS:
                    self._print()
        except OSError:
            self.enabled = False
        self._step = step

    def close(self) -> None:
        """Prints what has not been printed and ends the bar. May be called twice."""
        if not self.enabled:
            return
        try:
            if self._bar is not None:
                self._bar.close()
            self._print()
        except OSError:
            self.enabled = False

    def _print(self) -> None:
        if self._pending:
            print(self._pending, file=self._stream, flush=True)
            self._pending, self._printed = "", time.monotonic()


class Trackers:
    """Experiment trackers by name, through Accelerate's classes. Make the Accelerator first.

    Args:
        report_to: None, or names with commas between them: "tensorboard", "wandb", ...
        folder: the run's folder; trackers that write files do so in its `logs`.
        config: the run's configuration, nested or not.
        start: the step that the run goes on from; TensorBoard hides what it was told of later ones.
        enabled: False on all processes but one.

    Raises:
        InputError: a name that Accelerate doesn't know, or whose package is not installed.
    """

    def __init__(
        self,
        report_to: str | None,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        start: int = 0,
        enabled: bool = True,
    ) -> None:
        self._trackers: dict[str, Any] = {}
        self._warned: set[str] = set()
        kinds = tracker_classes(report_to)
        if not enabled:
            return
        for name, kind in kinds.items():
            self._try(name, partial(self._open, name, kind, Path(folder), start))
        flat = flat_config(config or {})
        self._each(lambda tracker: tracker.store_init_configuration(flat))

    def _open(self, name: str, kind: Any, folder: Path, start: int) -> None:
        args: list[Any] = [folder.name]
        if name == "tensorboard":
            args = [""]  # it makes a folder of the run's name in the logging folder, and ours is the run's already
        if kind.requires_logging_directory:
            args.append(folder / "logs")
        tracker = kind(*args, **({"purge_step": start + 1} if name == "tensorboard" and start else {}))
        tracker.start()
        self._trackers[name] = tracker

    def log(self, row: Mapping[str, float | int | str], step: int) -> None:
        """Reports one row of numbers."""
        self._each(lambda tracker: tracker.log(dict(row), step=step))

    def close(self) -> None:
        """Ends all trackers. May be called twice."""
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in self._trackers.items():
            self._try(name, partial(call, tracker))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker raises, the run goes on; it may be back at the next step
            if name not in self._warned:
                log.warning("tracker %s failed, the run goes on and will not warn of it again: %r", name, error)
            self._warned.add(name)


def tracker_classes(report_to: str | None) -> dict[str, Any]:
    """Accelerate's class of each tracker named; InputError for one that it doesn't know or that is not installed."""
    names = [name.strip() for name in (report_to or "").split(",")]
    return {name: _tracker_class(name) for name in names if name and name.lower() != "none"}


def _tracker_class(name: str) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
    if name not in LOGGER_TYPE_TO_CLASS:
        raise InputError(f"expected report_to to name trackers out of {known}, got {name!r}; fix the name")
    built_in = {str(kind) for kind in LoggerType}
    if name in built_in and name not in {str(kind) for kind in get_available_trackers()}:
        raise InputError(f"expected an installed tracker, got {name!r} without its package; pip install {name}")
    return LOGGER_TYPE_TO_CLASS[name]
