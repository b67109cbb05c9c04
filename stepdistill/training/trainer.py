"""A run: the accelerator, the run folder, and the fits made in it. What happens in a fit is :mod:`.loop`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.order import DataSet
from ..errors import InputError
from ..method import Method
from .config import TrainConfig
from .loop import Fit
from .optimization import NonFiniteError

__all__ = ["NonFiniteError", "Trainer"]


class Trainer:
    """Runs methods on data: one or several named fits, each resumable.

    Args:
        config: the run's options.
        output_dir: the run folder; checkpoints, metrics.jsonl and config.yaml go there.
        config_yaml: the resolved config, written as config.yaml when training starts.
    """

    def __init__(self, config: TrainConfig, output_dir: str | Path, config_yaml: str = "") -> None:
        from accelerate import Accelerator

        self.config, self.folder, self.config_yaml = config, Path(output_dir), config_yaml
        self._refuse_to_overwrite()
        try:
            self.accelerator = Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_steps=1)
        except ValueError as error:
            raise InputError(f"expected a precision this device has: {error}; fix --train.mixed_precision") from error
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
            torch.use_deterministic_algorithms(True)
        self.step = 0
        self._fits: set[str] = set()
        self.stop_requested = False

    # -- what recipes ask ---------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """True on the process that writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype for frozen weights under this run's mixed precision."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all processes and micro-batches."""
        per_process = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return per_process * int(self.accelerator.num_processes)

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def fit(
        self,
        method: Method,
        data: DataSet,
        name: str = "",
        on_validate: Callable[[int], None] | None = None,
        on_round: Callable[[int], None] | None = None,
        steps: int | None = None,
    ) -> None:
        """Trains `method` on `data` for all its rounds; a fit that is finished already is only loaded.

        Args:
            name: tells the fits of one run apart; the first and only one needs none.
            on_validate: called on the main process with the step, every `validation_steps`, EMA weights in place.
            on_round: called on all processes at the end of each round with its number; must be idempotent, since a run
                killed there calls it again.
            steps: optimizer steps of a round, instead of the config's `max_train_steps`.

        Afterwards the student holds its EMA weights, if there are any. On SIGTERM a checkpoint is saved and the process
        exits with 143.
        """
        if name in self._fits:
            raise ValueError(f"this run has a fit named {name!r} already; give each of them a name of its own")
        self._fits.add(name)
        run = Fit(self, method, data, name, self.config.max_train_steps if steps is None else steps)
        run.resume()
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            with run.wrapped():
                run.rounds(on_validate, on_round)
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
            run.close()
        if self.stop_requested:  # it came after the last step, while a callback ran
            raise SystemExit(143)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.stop_requested = True

    def _refuse_to_overwrite(self) -> None:
        if self.config.resume_from_checkpoint is None and any(
            (self.folder / part).exists() for part in ("checkpoints", "metrics.jsonl")
        ):
            raise InputError(
                f"expected a new output_dir, got {str(self.folder)!r}, which holds a run; continue it with "
                "--train.resume_from_checkpoint latest, or give another --output_dir"
            )
