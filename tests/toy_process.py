"""Runs that need processes of their own: `python toy_process.py MODE FOLDER ...`, from the tests of the loop.

kills, kills_in_saves, kills_sd    the same run twice, in FOLDER/whole and, killed with -9 again and again, in FOLDER/killed
ranks, ranks_sd    what each rank of a torchrun does; with one process, what they must agree with
prepare, dawdle, validate    runs that take their time, to be stopped in FOLDER; "hurry" goes on with them
full_disk          a run whose second checkpoint fails

The _sd ones distil the tiny Stable Diffusion pipeline that lies in FOLDER/pipeline.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adversaries import Prompted, game
from eyes import show
from ladders import ladder
from torch import nn
from toys import Duel, Numbers, Regression, Uneven, options, sd_table, stopping_after

from stepdistill.batch import Batch
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, LinearStudent
from stepdistill.method import Losses, Method
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.lora import LoraSpec
from stepdistill.networks.network import Network
from stepdistill.randomness import StepRandom
from stepdistill.training import checkpoint
from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.optimization import NonFiniteError
from stepdistill.training.trainer import Trainer

STEPS = 20


class Everything(Duel):
    """Two roles, dropout from the global generator, and state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.student.module[3].p = 0.3
        self.trace = torch.zeros(3)

    def after_step(self) -> None:
        self.trace = 0.9 * self.trace + self.student.module[2].bias.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"trace": self.trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trace = state["trace"]


class Latents(Numbers):
    """Latents for the tiny Stable Diffusion, with two prompts."""

    def __init__(self, cond: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor]) -> None:
        super().__init__(count=12, width=4 * 4 * 4)
        self.cond, self.uncond = cond, uncond

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        rows = torch.tensor(indices) % 2
        cond, uncond = ({k: v[rows] for k, v in c.items()} for c in (self.cond, self.uncond))
        return Batch(self.x0[list(indices)].reshape(-1, 4, 4, 4), cond, uncond, rng)


def train_everything(folder: Path) -> None:
    """The run that is killed."""
    config = options(
        max_train_steps=STEPS, checkpointing_steps=3, train_batch_size=4, gradient_accumulation_steps=2, ema_decay=0.9,
        resume_from_checkpoint="latest", lr_scheduler="cosine",
    )  # fmt: skip
    Trainer(config, folder).fit(Everything(), Numbers())


def stable_diffusion(pipeline: Path) -> tuple[Method, Latents]:
    """LCM-LoRA on a tiny pipeline in `pipeline`."""
    from stepdistill import families

    model = families.load(families.TeacherConfig(path=str(pipeline)))
    student = model.denoiser.with_lora(LoraSpec(2, 4.0, tuple(model.denoiser.lora_targets)))
    cond = model.encode_prompts(["a red square", "blue"])
    return LCM(LCMConfig(), student, model.denoiser), Latents(cond, model.uncond(cond))


def train_stable_diffusion(folder: Path) -> None:
    """The same with a LoRA on a UNet."""
    method, data = stable_diffusion(folder.parent / "pipeline")
    config = options(
        max_train_steps=STEPS, checkpointing_steps=3, train_batch_size=2, resume_from_checkpoint="latest", ema_decay=0.9
    )
    Trainer(config, folder).fit(method, data)


def life(run: Callable[[Path], None], folder: Path, kill_after: int | None, delay: float) -> int:
    """One process that runs; killed some milliseconds after a number of new rows. Returns its exit code, -9 if killed."""
    folder.mkdir(exist_ok=True)
    log = folder / "metrics.jsonl"
    torn = "" if not log.exists() else log.read_text()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(folder)
            code = 0
            sys.stdout.flush()
        finally:
            os._exit(code)
    while kill_after is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        text = log.read_text() if log.exists() else ""
        if text != torn and text.count("\n") >= kill_after:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def import_for_all(*modules: str) -> None:
    """What takes seconds to import is imported before the lives begin, not in each of them."""
    for module in modules:
        importlib.import_module(module)


def killed_and_whole(run: Callable[[Path], None], folder: Path) -> None:
    """A run that is killed at ten random moments before it may finish, and one that is not; prints the exit codes."""
    import_for_all("accelerate")
    torch.optim.AdamW([torch.zeros(1)])  # which imports a compiler
    codes, chance = [], random.Random()
    for rows in sorted(chance.sample(range(1, STEPS), 10)):
        codes.append(life(run, folder / "killed", rows, chance.uniform(0.0, 0.03)))
    codes.append(life(run, folder / "killed", None, 0.0))
    codes.append(life(run, folder / "whole", None, 0.0))
    print(json.dumps({"codes": codes}))


def kills(folder: Path) -> None:
    """The toy method."""
    killed_and_whole(train_everything, folder)


def die(*_: Any) -> None:
    """kill -9 from within."""
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def kills_in_saves(folder: Path) -> None:
    """Three lives that end within their second checkpoint, and two that don't; prints the exit codes."""
    import_for_all("accelerate")

    def in_a_file(saves: Saves) -> None:
        real = checkpoint.save_file
        checkpoint.save_file = lambda *args: (real(*args), saves.files.append(args), len(saves.files) == 9 and die())

    def before_the_rename(saves: Saves) -> None:
        real = CheckpointStore._commit
        CheckpointStore._commit = lambda *args: die() if saves.count == 2 else real(*args)

    def before_the_rotation(saves: Saves) -> None:
        real = CheckpointStore._rotate
        CheckpointStore._rotate = lambda *args: die() if saves.count == 2 else real(*args)

    def dying(hook: Callable[[Saves], None]) -> Callable[[Path], None]:
        def run(folder: Path) -> None:
            hook(Saves())
            train_everything(folder)

        return run

    hooks = (in_a_file, before_the_rename, before_the_rotation)
    codes = [life(dying(hook), folder / "killed", None, 0.0) for hook in hooks]
    codes += [life(train_everything, folder / name, None, 0.0) for name in ("killed", "whole")]
    print(json.dumps({"codes": codes}))


class Saves:
    """Counts the checkpoints and the files that this process has begun to write."""

    def __init__(self) -> None:
        self.count, self.files = 0, []
        real = checkpoint._write

        def write(*args: Any) -> None:
            self.count += 1
            real(*args)

        checkpoint._write = write


def kills_stable_diffusion(folder: Path) -> None:
    """LCM-LoRA."""
    import_for_all("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft")
    killed_and_whole(train_stable_diffusion, folder)


class Poisoned(Regression):
    """The micro-batch that begins in the middle of the global batch has a NaN loss on step 3."""

    def training_step(self, batch: Batch) -> Losses:
        losses = super().training_step(batch)
        if self.step == 2 and min(batch.rng.positions) == 4:
            losses.terms["regression"] = losses.terms["regression"] * torch.nan
        return losses


class Shared(Duel):
    """Student and critic are two halves of one module: DDP must wait for the half in question alone."""

    def __init__(self) -> None:
        super().__init__()
        both = nn.ModuleDict({"student": self.student.module, "critic": self.critic.module})
        self.student, self.critic = Half(both, "student"), Half(both, "critic")


class Half(Network):
    """One part of a module that two networks share, as two adapters share a base."""

    def __init__(self, both: nn.ModuleDict, part: str) -> None:
        both.requires_grad_(False)[part].requires_grad_(True)
        super().__init__(Parts(both, part))
        both.requires_grad_(True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Parts(nn.Module):
    """Computes with one of its parts."""

    def __init__(self, both: nn.ModuleDict, part: str) -> None:
        super().__init__()
        self.both, self.part = both, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """That part's output."""
        return self.both[self.part](x)


def linear_lcm() -> Method:
    """LCM of a full student: two forwards of it a step, one without gradient."""
    teacher = Gaussian(2.0, 0.3, sd_table(), "x0")
    config = LCMConfig(num_ddim_timesteps=10)
    grid = LCM(config, teacher, teacher).grid
    return LCM(config, LinearStudent(grid, teacher.schedule).imitate(teacher), teacher)


def fit_in(folder: Path, method: Method, data: Any = None, on_validate: Any = None, **changes: Any) -> None:
    """A fit whose global batch is 8, whatever the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = options(**{"train_batch_size": 8 // world, "checkpointing_steps": 4, **changes})
    Trainer(config, folder).fit(method, data or Numbers(), on_validate=on_validate)


def climb_in(folder: Path, kind: str) -> None:
    """Three rungs of a small student; with a LoRA a second adapter comes to the wrapped base after the first."""
    fit_in(folder / f"ladder-{kind}", ladder(kind), ema_decay=0.9, adam_epsilon=1e-3, max_train_steps=3)


def play_in(folder: Path, kind: str) -> None:
    """Adversarial games: two trained roles, one with buffers; with a LoRA the judge looks through the student's own base."""
    method = game(kind, warmup_steps=2, r1_every=2, guard_every=2, approximate_r1=1.0)
    fit_in(folder / f"ladd-{kind}", method, Prompted(), ema_decay=0.9, adam_epsilon=1e-3)
    method = show(kind, warmup_steps=2, r1_every=2, guard_every=2, crop=3, image_condition=True)
    fit_in(folder / f"add-{kind}", method, Prompted(), ema_decay=0.9, adam_epsilon=1e-3)


def ranks(folder: Path) -> None:
    """All that 1 and 2 processes must agree on; writes how the broken and the stopped run ended, by rank."""
    fit_in(folder / "regression", Regression(), ema_decay=0.9)
    fit_in(folder / "duel", Duel())
    fit_in(folder / "uneven", Uneven(), Numbers(count=20))
    fit_in(folder / "lcm", linear_lcm())
    fit_in(folder / "shared", Shared())
    climb_in(folder, "full")
    play_in(folder, "full")
    steps = 3 if "WORLD_SIZE" in os.environ else 6  # several processes begin it, one goes on
    fit_in(folder / "moved", Regression(), ema_decay=0.9, max_train_steps=steps)
    ends = {}
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        fit_in(folder / "poisoned", Poisoned(), train_batch_size=4 // world, gradient_accumulation_steps=2)
    except NonFiniteError as error:
        ends["poisoned"] = str(error)
    rank, method = int(os.environ.get("RANK", "0")), Regression()
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1

    def stop() -> None:
        if rank == last:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with stopping_after(method, 3, stop):
            fit_in(folder / "stopped", method)
    except SystemExit as error:
        ends["stopped"] = str(error.code)
    (folder / f"ends-{rank}.json").write_text(json.dumps(ends))


def ranks_stable_diffusion(folder: Path) -> None:
    """LCM-LoRA, the student and the teacher on one base, in all processes."""
    method, data = stable_diffusion(folder / "pipeline")
    for i, parameter in enumerate(method.networks()["student"].trainable()):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
    fit_in(folder / "lcm", method, data, learning_rate=1e-3, adam_epsilon=1e-2)
    climb_in(folder, "lora")
    play_in(folder, "lora")


def prepare(folder: Path) -> None:
    """Before the fit, for a minute: as encoding images does."""
    Trainer(options(), folder)
    (folder / "ready").touch()
    time.sleep(60.0)


def dawdle(folder: Path, pause: float = 0.1) -> None:
    """A run that saves nothing before its end; goes on where one is."""

    class Slow(Everything):
        def after_step(self) -> None:
            super().after_step()
            time.sleep(pause)
            (folder / "ready").touch()

    fit_in(
        folder, Slow(), max_train_steps=STEPS, ema_decay=0.9, checkpointing_steps=100, resume_from_checkpoint="latest"
    )


def hurry(folder: Path) -> None:
    """The same without pauses."""
    dawdle(folder, pause=0.0)


def validate(folder: Path) -> None:
    """The same with a validation of a minute after step 5."""

    def on_validate(_step: int) -> None:
        (folder / "ready").touch()
        time.sleep(60.0)

    fit_in(folder, Everything(), on_validate=on_validate, max_train_steps=STEPS, ema_decay=0.9, validation_steps=5)


def full_disk(folder: Path) -> None:
    """The disk is full in the middle of the second checkpoint; writes how it ended, by rank."""
    real, calls = checkpoint.save_file, [0]

    def save_file(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > 8:  # a checkpoint has six files
            raise OSError(28, "No space left on device")
        real(*args)

    checkpoint.save_file = save_file
    try:
        fit_in(folder, Everything(), ema_decay=0.9)
    except InputError as error:
        (folder / f"ended-{os.environ.get('RANK', '0')}").write_text(str(error))


def main() -> None:
    torch.set_num_threads(1)
    modes = {
        "kills": kills, "kills_in_saves": kills_in_saves, "kills_sd": kills_stable_diffusion,
        "ranks": ranks, "ranks_sd": ranks_stable_diffusion,
        "prepare": prepare, "dawdle": dawdle, "hurry": hurry, "validate": validate, "full_disk": full_disk,
    }  # fmt: skip
    for mode, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        modes[mode](Path(folder))


if __name__ == "__main__":
    main()
