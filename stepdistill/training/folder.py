"""The run folder: whose it is, whether it has room, and how all processes learn that writing to it failed."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .config import binding, flat_yaml, resumed_changes

LOCK, CONFIG = ".lock", "config.yaml"

log = logging.getLogger(__name__)

_held: dict[tuple[int, int], int] = {}  # (device, inode) of a lock file -> its handle, open until the process ends


def on_main(accelerator: Any, action: Callable[[], object]) -> None:
    """Runs `action` on the main process while the others wait; where it fails, all processes raise and none is left waiting.

    Raises what `action` raised on the main process, and an InputError with the same text on the others.
    """
    from accelerate.utils import broadcast_object_list

    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:  # raised again below, once the others know
            failure = error
    if accelerator.num_processes > 1:
        failed = torch.tensor(float(failure is not None), device=accelerator.device)
        if accelerator.reduce(failed, "sum") > 0 and failure is None:
            failure = InputError(*broadcast_object_list([None]))
        elif failure is not None:
            broadcast_object_list([str(failure)])
    if failure is not None:
        raise failure


class RunFolder:
    """A run's place, and this process's own until it ends, however it ends. For the main process.

    A folder that exists is taken when the run is set up, before hours of preparing; a new one is made when the first fit
    begins, so that bad input leaves nothing behind.

    Args:
        path: the folder.
        config_yaml: the resolved config of the run, "" if unknown.
        resume: whether it may hold a run.
    """

    def __init__(self, path: Path, config_yaml: str, resume: bool) -> None:
        self.path, self.config_yaml, self.resume = path, config_yaml, resume
        self._taken = False

    def take(self) -> None:
        """Takes a folder that exists.

        Raises:
            InputError: it holds a run that is not to be resumed, or one of another config, or another process is at it.
        """
        if self._taken or not self.path.exists():
            return
        if not self.resume and any((self.path / part).exists() for part in ("checkpoints", "metrics.jsonl")):
            raise InputError(
                f"expected a new output_dir, got {str(self.path)!r}, which holds a run; continue it with "
                "--train.resume_from_checkpoint latest, or give another --output_dir"
            )
        config = self.path / CONFIG
        if (self.path / "checkpoints").is_dir() and config.is_file():
            saved, now = flat_yaml(config.read_text(encoding="utf-8")), flat_yaml(self.config_yaml)
            resumed_changes(binding(saved), binding(now), str(config))
        try:
            lock(self.path / LOCK)
        except OSError as error:
            raise self._unusable(error) from error
        self._taken = True

    def begin(self) -> None:
        """Makes and takes it, and writes the config: whole, or it stays as it was. Raises as :meth:`take` does."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.take()
            if self.config_yaml:
                temp = self.path / f".{CONFIG}.new"
                temp.write_text(self.config_yaml, encoding="utf-8")
                temp.replace(self.path / CONFIG)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> InputError:
        return InputError(f"expected a folder to write to, got {str(self.path)!r}: {error}; fix --output_dir")


def lock(path: Path) -> None:
    """Locks a file that holds our process id. The system lets go of it when the process ends, by kill -9 too.

    Nothing happens where this process has it already. InputError where another one has it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    about = os.fstat(handle)
    if (about.st_dev, about.st_ino) in _held:  # an earlier Trainer of this process
        os.close(handle)
        return
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise InputError(
            f"expected a run folder that no other process is at, got {str(path.parent)!r}, in use by {owner}; wait for it or "
            "stop it, or give another --output_dir"
        ) from None
    except (OSError, ImportError) as error:
        log.warning("%s can't be locked (%s): take care not to start a second run there", path.parent, error)
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[about.st_dev, about.st_ino] = handle


def check_space(folder: Path, size: int, copies: int) -> None:
    """Looks for room for `copies` more checkpoints of `size` bytes: an InputError without it for one, else a warning."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"expected room for a checkpoint of about {_shown(size)} in {str(folder)!r}, got {_shown(free)} free; make "
            "room, or give an --output_dir on another disk"
        )
    if free < size * copies:
        log.warning(
            "%s has %s free, and %d checkpoints of about %s are to come: make room, or lower --train.checkpoints_total_limit",
            folder, _shown(free), copies, _shown(size),
        )  # fmt: skip


def _shown(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
