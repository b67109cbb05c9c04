"""The loop. Everything that exists once per run lives here: devices, precision, accumulation, clipping, EMA, checkpoints.

A run is a function of its config: data order, noise and times come from (seed, step, position), so a run that was killed
continues to the same bits, and micro-batches or processes only decide who computes what.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

import torch

from ..batch import Batch
from ..data.order import DataSet
from ..errors import InputError
from ..method import Method, Phase
from ..networks.ema import EMA
from ..networks.network import Network
from ..randomness import derived_seed
from .batches import Batches
from .checkpoint import CheckpointStore
from .folder import check_space, on_main
from .optimization import SMALLEST_SCALE, NonFinite, Role, Sums, lr_factor
from .parallel import no_sync, sharing
from .snapshot import restore, room, snapshot
from .trackers import MetricsLog, Progress, Trackers

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)


class Fit:
    """The state of one :meth:`Trainer.fit`."""

    def __init__(self, trainer: Trainer, method: Method, data: DataSet, name: str, steps: int) -> None:
        if name.isdigit():
            raise ValueError(f"expected a fit name that is no number, got {name!r}")
        self.trainer, self.method, self.data, self.name, self.steps = trainer, method, data, name, steps
        self.config, self.accelerator, self.stop = trainer.config, trainer.accelerator, trainer.stop
        self.batches = Batches(self.config, data, self.accelerator)
        self.nonfinite = NonFinite(self.config.on_nonfinite == "skip", trainer.is_main)
        self.first = self.start = trainer.step  # the global steps at which the fit and the round began
        self.round = 0
        self.networks: dict[str, Network] = {}
        self.meet_networks()
        trained = method.trained()
        if trained - self.networks.keys():
            raise ValueError(f"expected phases that train some of {sorted(self.networks)}, got {sorted(trained)}")
        # before roles and averages are made of the parameters, which this may replace
        self.parallel = sharing(self.config.parallel, method, trained, self.accelerator)
        self.roles = {
            n: Role(n, network, self.config, self.accelerator.scaler)
            for n, network in self.networks.items()
            if n in trained
        }
        self.ema = self._new_ema()
        self.store = CheckpointStore(trainer.folder / "checkpoints" / name, self.config.checkpoints_total_limit)
        self.metrics = MetricsLog(trainer.folder / "metrics.jsonl", trainer.is_main)
        self.trackers: Trackers | None = None
        self.saved_at: tuple[int, int] | None = None

    def meet_networks(self) -> None:
        """Takes in the method's networks, on this run's device; a later round may have more of them than the first."""
        known, self.networks = self.networks, self.method.networks()
        for name in self.networks.keys() - known.keys():
            self.networks[name].module.to(self.trainer.device)

    def _new_ema(self) -> EMA | None:
        if self.config.ema_decay is None or "student" not in self.roles:
            return None
        return EMA(self.networks["student"], self.config.ema_decay)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Loads the checkpoint asked for, if there is one, and prepares the run folder."""
        which, trainer = self.config.resume_from_checkpoint, self.trainer
        if which is not None:
            if self.name and which != "latest":
                raise InputError(
                    f"expected --train.resume_from_checkpoint latest in a run of named fits, got {which!r}; remove newer "
                    f"checkpoints of fit {self.name!r} to go back"
                )
            found = self.store.find(which, strict=self.config.resume_strict)
            if found is None:
                self.accelerator.print(f"no checkpoint in {self.store.folder}: starting from step {trainer.step}")
            else:
                restore(self, found)
                self.accelerator.print(f"resuming from {found.path} (step {found.step})")
        starts = self.accelerator.gather(torch.tensor([trainer.step], device=trainer.device)).unique().tolist()
        if len(starts) > 1:
            raise InputError(
                f"expected all processes to find the same checkpoint, got steps {starts}; put --output_dir on a file system "
                "that all nodes share"
            )
        on_main(self.accelerator, trainer.place.begin)

    def go_back(self) -> None:
        """Takes back what was saved and told of later steps. Not before a step is to be made: a finished fit has later ones."""
        if self.trackers is None:
            on_main(self.accelerator, self._go_back)
            self.trackers = Trackers(
                self.config.report_to, self.trainer.folder, vars(self.config), self.trainer.step, self.trainer.is_main
            )

    def _go_back(self) -> None:
        check_space(self.trainer.folder, *room(self))
        # in this order: "latest" must not come to mean a step whose metrics are gone
        self.store.set_aside_later(self.trainer.step)
        self.metrics.rewind(self.trainer.step)

    def save(self) -> None:
        """One checkpoint of this moment, unless it has just been saved."""
        now = (self.round, self.trainer.step)
        if self.saved_at != now:
            files, state = snapshot(self)  # on all processes: what they share out is gathered
            on_main(self.accelerator, lambda: self.store.save(self.trainer.step, files, state))
        self.saved_at = now

    # -- rounds and steps ---------------------------------------------------------------------------------------------

    def rounds(self, on_validate: Callable[[int], None] | None, on_round: Callable[[int], None] | None) -> None:
        """All rounds to their ends. A round ends with its EMA as its weights; the next begins with a fresh optimizer."""
        while True:
            stopped = self.one_round(on_validate)
            self.save()
            if stopped:
                self.stop.leave(f"step {self.trainer.step} is saved")
            if self.ema is not None:
                self.ema.fold()
            if on_round is not None:
                with self.parallel.whole(), self.stop.at_once():
                    on_round(self.round)
            with self.parallel.changing():
                if not self.method.next_round():
                    return
            self.meet_networks()
            self.round, self.start = self.round + 1, self.trainer.step
            for role in self.roles.values():
                role.reset()
            self.ema = self._new_ema()
            self.save()

    def one_round(self, on_validate: Callable[[int], None] | None) -> bool:
        """Steps from where the run is to the end of the round; True if a signal came before."""
        trainer, end = self.trainer, self.start + self.steps
        if trainer.step < end:
            self.go_back()
        progress = Progress(end, trainer.step, self.name or type(self.method).__name__, trainer.is_main)
        with closing(progress):
            while trainer.step < end:
                self.step_and_tell(progress)
                if trainer.step % self.config.checkpointing_steps == 0:
                    self.save()
                if self.config.validation_steps and trainer.step % self.config.validation_steps == 0:
                    self.validate(on_validate)
                if self.stop.agreed(self.accelerator):
                    return True
        return False

    def step_and_tell(self, progress: Progress) -> None:
        """One step, its row in metrics.jsonl and the trackers, and the progress."""
        began = time.perf_counter()
        lr = self.config.learning_rate * lr_factor(self.config, self.trainer.step - self.start, self.steps)
        row = self.one_step(lr)
        self.trainer.step += 1
        seconds = time.perf_counter() - began
        row = {"step": self.trainer.step, **row, "learning_rate": lr, "seconds": round(seconds, 4)}
        self.metrics.write(row)
        if self.trackers is not None:
            self.trackers.log(row, self.trainer.step)
        progress.update(self.trainer.step, row.get("loss", math.nan), lr, seconds)

    def one_step(self, lr: float) -> dict[str, float]:
        """All phases of one step on one global batch; returns the logged means."""
        method, trainer = self.method, self.trainer
        method.step = trainer.step
        batches = self.batches.of(trainer.step)
        row: dict[str, float] = {}
        phases = method.phases()
        for number, phase in enumerate(phases):
            if trainer.step % phase.every == 0:
                means = self.one_phase(number, phase, batches, lr)
                if len(phases) > 1:
                    row[f"loss/{'+'.join(phase.trains)}"] = means["loss"]
                row.update(means)
        if (warning := method.watch(row)) and trainer.is_main:
            log.warning("step %d: %s", trainer.step + 1, warning)
        if not self.nonfinite.end_step():
            with torch.no_grad():
                method.after_step()
                if self.ema is not None:
                    self.ema.update()
        if self.nonfinite.skip:
            row["skipped"] = self.nonfinite.skipped
        for batch in batches:  # a data set may hand out the same Batch again
            batch.memo.clear()
        return row

    def one_phase(self, number: int, phase: Phase, batches: list[Batch], lr: float) -> dict[str, float]:
        """Gradients of all micro-batches, then one optimizer step of each role this phase trains."""
        sums = Sums()
        with self.learning(phase.trains):
            for i, batch in enumerate(batches):
                self.seed_globally(number, i)
                with self.sync_only_if_last(i == len(batches) - 1, phase.trains):
                    with self.parallel.autocast():
                        losses = phase.loss(batch)
                    self.accelerator.backward(losses.total * losses.count)
                sums.add(losses)
            means, count, broken = sums.means(self.accelerator)
            if not math.isfinite(means["loss"]):  # metrics may be NaN
                self._not_finite(f"loss ({', '.join(f'{k} = {v:g}' for k, v in means.items())})", phase, broken)
                return means
            # DDP averaged over processes: a true mean over the global batch needs world size / total count
            scale = self.accelerator.num_processes / count
            norms = {role: self.roles[role].clip(scale) for role in phase.trains}
            self._step(norms, phase, lr * phase.rate)
        for role, norm in norms.items():
            means["grad_norm" if len(self.roles) == 1 else f"grad_norm/{role}"] = norm
        return means

    def _step(self, norms: dict[str, float], phase: Phase, lr: float) -> None:
        """Steps the roles of `norms`: all of them, or none where one norm is not finite."""
        scaler = self.accelerator.scaler
        bad = [role for role, norm in norms.items() if not math.isfinite(norm)]
        # an overflow in fp16 is what the scaler is there for: it skips the step and lowers its scale
        if bad and (scaler is None or scaler.get_scale() < SMALLEST_SCALE):
            self._not_finite(f"gradient norm of {', '.join(f'{role} ({norms[role]})' for role in bad)}", phase)
        else:
            for role in norms:
                self.roles[role].step(lr)
        if scaler is not None:
            scaler.update()  # once for all roles, since their gradients came with one scale

    def _not_finite(self, what: str, phase: Phase, micro_batches: Sequence[int] = ()) -> None:
        step, trained = self.trainer.step, ", ".join(phase.trains)
        samples = self.batches.named(step, micro_batches)
        self.nonfinite.meet(f"{what} is not finite at step {step + 1} (training {trained}), {samples} of the data set")
        for role in phase.trains:
            self.roles[role].drop_gradients()

    def seed_globally(self, phase: int, micro_batch: int) -> None:
        """What cannot avoid the global generators (dropout, generate) becomes a function of the step, too."""
        rank = int(self.accelerator.process_index)
        seed = derived_seed(self.config.seed, self.trainer.step, "global", phase, micro_batch, rank)
        # not torch.manual_seed, which also queues seeds for accelerators that aren't there
        torch.default_generator.manual_seed(seed)
        if self.trainer.device.type != "cpu":
            torch.get_device_module(self.trainer.device).manual_seed(seed)

    @contextmanager
    def learning(self, trains: Sequence[str]) -> Iterator[None]:
        """Within it only these roles require grad."""
        flags = [(p, p.requires_grad) for role in self.roles.values() for p in role.parameters]
        for name, role in self.roles.items():
            for parameter in role.parameters:
                parameter.requires_grad_(name in trains)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextmanager
    def sync_only_if_last(self, last: bool, trains: Sequence[str]) -> Iterator[None]:
        """Gradients cross processes in the last micro-batch, and only those of the roles that train."""
        with ExitStack() as stack:
            for name, role in self.roles.items():
                if not (last and name in trains):
                    stack.enter_context(no_sync(role.network.net))
            yield

    def wrapped(self) -> AbstractContextManager[None]:
        """Within it the trained roles are wrapped for several processes; afterwards they are plain modules again."""
        return self.parallel.training(self.learning)

    # -- what is told -------------------------------------------------------------------------------------------------

    def validate(self, on_validate: Callable[[int], None] | None) -> None:
        """The recipe's samples, with EMA weights, on the main process; training randomness is not touched."""
        if on_validate is not None:
            with ExitStack() as stack:
                if self.ema is not None:
                    stack.enter_context(self.ema.applied())
                stack.enter_context(self.parallel.whole(everywhere=False))
                if self.trainer.is_main:
                    stack.enter_context(torch.no_grad())
                    self.stop.breakable(lambda: on_validate(self.trainer.step))
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Ends the trackers."""
        if self.trackers is not None:
            self.trackers.close()
