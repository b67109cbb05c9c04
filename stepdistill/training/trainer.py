"""A run: the accelerator, the run folder, and the fits made in it. What happens in a fit is :mod:`.loop`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.order import DataSet
from ..errors import InputError
from ..method import Method
from .config import TrainConfig, binding, flat_config, flat_yaml
from .folder import RunFolder, on_main
from .loop import Fit
from .optimization import NonFiniteError
from .parallel import check_shared, refuse_other_wrappers
from .processes import end_gloo_at_exit
from .stopping import Stop
from .trackers import tracker_classes

__all__ = ["NonFiniteError", "Trainer"]


class Trainer:
    """Runs methods on data: one or several named fits, each resumable.

    Args:
        config: the run's options.
        output_dir: the run folder; checkpoints, metrics.jsonl and config.yaml go there. It is locked until the process ends.
        config_yaml: the resolved config, written as config.yaml when training starts; a resumed run must agree with it.

    Attributes:
        teacher: dtype -> a hash of the frozen teacher (`Model.denoiser_hash`), {} where nobody says. Checkpoints keep it: a run
            goes on with this teacher alone, wherever it lies.

    From here on SIGTERM and SIGINT end the process as :mod:`.stopping` says, until :meth:`close`.

    Raises:
        InputError: the folder holds a run that is not to be resumed or has another config, or is in use.
    """

    def __init__(self, config: TrainConfig, output_dir: str | Path, config_yaml: str = "") -> None:
        from accelerate import Accelerator

        self.config, self.folder = config, Path(output_dir)
        refuse_other_wrappers()
        tracker_classes(config.report_to)  # a wrong name is said before hours of preparing
        try:
            self.accelerator = Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_steps=1)
        except ValueError as error:
            raise InputError(f"expected a precision this device has: {error}; fix --train.mixed_precision") from error
        self.resolved = binding({**flat_yaml(config_yaml), **flat_config({"train": vars(config)})})
        self.place = RunFolder(self.folder, config_yaml, resume=config.resume_from_checkpoint is not None)
        on_main(self.accelerator, self.place.take)
        self.stop = Stop(speaks=self.is_main)
        end_gloo_at_exit()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
            torch.use_deterministic_algorithms(True)
        self.step = 0
        self.teacher: dict[str, str] = {}
        self._fits: set[str] = set()

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
    def rank(self) -> int:
        """The number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """How many processes there are."""
        return int(self.accelerator.num_processes)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype for frozen weights under this run's mixed precision."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all processes and micro-batches."""
        per_process = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return per_process * self.world

    def check(self, method: Method) -> None:
        """InputError where this run can't train `method`: :meth:`fit` asks, and a recipe before earlier fits."""
        check_shared(self.config.parallel, method)

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Gives SIGTERM and SIGINT back. The run folder stays this process's own until it ends."""
        self.stop.close()

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

        Afterwards the student holds its EMA weights, if there are any. On SIGTERM or SIGINT all processes save a checkpoint of
        the same step and exit with 143 or 130 (:mod:`.stopping`); `on_validate` and `on_round` are broken off in the middle.
        """
        if name in self._fits:
            raise ValueError(f"this run has a fit named {name!r} already; give each of them a name of its own")
        self._fits.add(name)
        run = Fit(self, method, data, name, self.config.max_train_steps if steps is None else steps)
        run.resume()
        try:
            with self.stop.deferred(), run.wrapped():
                run.rounds(on_validate, on_round)
        finally:
            run.close()
