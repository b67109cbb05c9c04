"""What each rank of a torchrun does, and what one process must agree with: `python parallel_process.py MODE FOLDER`.

toys    a small full student with a target that follows it, under fsdp: whole, killed and resumed, one rank's loss broken;
        and ladders, whose student is copied at the end of each round
more    the same killed at other moments and moved between ddp and fsdp; LCM of the tiny UNet that lies in FOLDER/pipeline
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from ladders import ladder
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from toys import Killed, Numbers, options, stopping_after

from stepdistill.batch import Batch
from stepdistill.method import Losses, Method
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.network import Module, Network
from stepdistill.training import parallel
from stepdistill.training.optimization import NonFiniteError, Role
from stepdistill.training.trainer import Trainer

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Block(nn.Module):
    """A residual block; odd sizes, which two processes can't halve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 5), nn.Linear(5, width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # a new tensor, which the module before it was wrapped doesn't know
        return x + self.outer(self.inner(x).tanh())


class Blocks(nn.Module):
    """Three blocks between two layers, the first of them frozen."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width).requires_grad_(False), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def blocks(seed: int) -> Module:
    """The network, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Module(Blocks())


class Follow(Method):
    """A student between the data and a target that follows it; its own forward without gradient comes before backward."""

    def __init__(self, seed: int = 0) -> None:
        self.student = blocks(seed)
        self.own = self.student.net
        self.target = self.student.frozen_copy()
        self.held: list[int] = []  # how many numbers of the student's weights this process holds after each step

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "target": self.target}

    def training_step(self, batch: Batch) -> Losses:
        x0 = batch.data()
        noisy = x0 + 0.5 * batch.rng.normal("noise", x0.shape[1:])
        guess = self.student(noisy)
        with torch.no_grad():
            wanted = 0.5 * x0 + 0.3 * self.target(noisy) + 0.2 * self.student(x0)
        return Losses({"follow": (guess - wanted).square().mean()}, count=len(batch))

    @torch.no_grad()
    def after_step(self) -> None:
        average, weights = dict(self.target.module.named_parameters()), self.student.named_trainable()
        torch._foreach_lerp_([average[name] for name in weights], list(weights.values()), 0.1)
        shares = [p.to_local() for p in self.student.module.parameters() if isinstance(p, DTensor)]
        self.held.append(sum(p.numel() for p in [*shares, *self.own.parameters()]))
        self.student.module.eval()


class Poisoned(Follow):
    """The samples of one half of the global batch have a NaN loss on step 3."""

    def training_step(self, batch: Batch) -> Losses:
        losses = super().training_step(batch)
        if self.step == 2 and max(batch.rng.positions) == 7:
            losses.terms["follow"] = losses.terms["follow"] * torch.nan
        return losses


class Told:
    """Writes down what the callbacks of a fit see in the student, on this rank."""

    def __init__(self, folder: Path, method: Method) -> None:
        self.folder, self.method = folder, method
        self.own = method.networks()["student"].net

    def note(self, moment: str) -> None:
        """The student's weights at this moment; it must be its own plain module, and able to compute."""
        net = self.method.networks()["student"].module
        assert net is self.own, type(net)
        assert not any(isinstance(p, DTensor) for p in net.parameters())
        assert not net.training or not isinstance(net, Blocks), "after_step has set it to eval"
        seen = {name: value.clone() for name, value in net.state_dict().items()}
        if isinstance(net, Blocks):
            seen["answer"] = copy.deepcopy(net)(torch.ones(1, 3))  # which must not count as a call
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(seen, self.folder / f"seen-{moment}-{RANK}.safetensors")

    def validated(self, step: int) -> None:
        """Only the main process is called, so no other can take part in its forward."""
        self.note(f"step{step}")

    def ended(self, _number: int) -> None:
        """On all processes."""
        self.note("round")


def fit_in(folder: Path, method: Method, steps: int = 6, told: bool = False, data: Any = None, **changes: Any) -> None:
    """A fit whose global batch is 8 in two micro-batches, whatever the number of processes; goes on where it can."""
    defaults = {"ema_decay": 0.9, "validation_steps": 3, "resume_from_checkpoint": "latest", "checkpointing_steps": 2}
    config = options(
        train_batch_size=4 // WORLD, gradient_accumulation_steps=2, max_train_steps=steps, **{**defaults, **changes}
    )
    notes = Told(folder, method)
    callbacks = {"on_validate": notes.validated, "on_round": notes.ended} if told else {}
    Trainer(config, folder).fit(method, data or Numbers(), **callbacks)
    if told:
        notes.note("end")


def toys(folder: Path) -> dict[str, Any]:
    """Runs of the small student under fsdp; returns what this rank has seen."""
    whole = Follow(seed=RANK)  # each process begins with weights of its own: those of rank 0 are meant
    fit_in(folder / "fsdp", whole, told=True, parallel="fsdp")
    killed_and_resumed(folder, 3)
    for given in (True, False):
        climb_in(folder / f"ladder-{given}", given, parallel="fsdp")
    fit_in(folder / "one-fsdp", Follow(seed=9), parallel="fsdp")  # begun by one process
    fit_in(folder / "fsdp-one", Follow(), steps=3, parallel="fsdp")  # to be ended by one
    with expected(NonFiniteError) as errors:
        fit_in(folder / "poisoned", Poisoned(), parallel="fsdp")
    return {"held": whole.held, "poisoned": errors, "scaled": scaled_steps()}


def climb_in(folder: Path, given: bool, death: int = 0, **changes: Any) -> Progressive:
    """Three rungs of two steps each, whose first teacher is given, or a copy of the student; killed after a step."""
    method = ladder("full", given)
    # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
    with stopping_after(method, death, Killed.now):
        fit_in(folder, method, 2, adam_epsilon=1e-3, **changes)
    return method


def more(folder: Path) -> dict[str, Any]:
    """Kills at other moments, moves between ddp and fsdp, and a UNet."""
    killed_and_resumed(folder, 4)
    killed_and_resumed(folder, 6)
    for given in (True, False):
        climb_in(folder / f"ladder-{given}", given, parallel="fsdp")
        for death in (2, 3, 6):  # in the last step of the first rung, and in both parts of later ones
            with expected(Killed):
                climb_in(folder / f"ladder-{given}-{death}", given, death, parallel="fsdp", checkpointing_steps=1)
            climb_in(folder / f"ladder-{given}-{death}", given, parallel="fsdp", checkpointing_steps=1)
    fit_in(folder / "fsdp", Follow(), parallel="fsdp")
    fit_in(folder / "fsdp", Follow(seed=9), parallel="fsdp")  # which finds it finished
    fit_in(folder / "ddp", Follow(), told=True)
    for before, after in (("fsdp", "ddp"), ("ddp", "fsdp")):
        fit_in(folder / f"{before}-{after}", Follow(), steps=3, parallel=before)
        fit_in(folder / f"{before}-{after}", Follow(seed=9), parallel=after)
    unet(folder)
    AcceleratorState._reset_state()  # which fixes the precision once in a process
    caches = []
    for kind in ("fsdp", "ddp"):
        method = Follow()
        method.student.module.register_forward_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
        fit_in(folder / f"{kind}-bf16", method, parallel=kind, mixed_precision="bf16")
    return {"caches": caches}


def killed_and_resumed(folder: Path, step: int) -> None:
    """The run of FOLDER/fsdp, killed on all ranks after `step` steps, and resumed."""
    method = Follow()
    with expected(Killed), stopping_after(method, step, Killed.now):
        fit_in(folder / f"killed-{step}", method, parallel="fsdp")
    fit_in(folder / f"killed-{step}", Follow(seed=9), parallel="fsdp")


@contextmanager
def expected(kind: type[BaseException]) -> Iterator[list[str]]:
    """Catches an error of `kind`, which must come; its message is in the list afterwards."""
    messages: list[str] = []
    try:
        yield messages
    except kind as error:
        messages.append(str(error))
    assert len(messages) == 1


def scaled_steps() -> list[list[float]]:
    """(the norm, the scale, a weight) after steps with fp16's loss scaler; in the second the last rank's gradient overflows.

    Each has two micro-batches, and no gradient crosses processes before the last.
    """
    from accelerate import Accelerator

    method = Follow()
    shared = parallel.sharing("fsdp", method, {"student"}, Accelerator())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    role, steps = Role("student", method.student, options(), scaler), []
    with shared.training(None):  # type: ignore[arg-type]
        for poison in (1.0, torch.inf, 1.0):
            x = torch.ones(2, 3) * (poison if RANK == WORLD - 1 else 1.0)
            with parallel.no_sync(method.student.net):
                scaler.scale(method.student(x).square().mean()).backward()
            assert all(p.grad is None for p in role.parameters)
            scaler.scale(method.student(-x).square().mean()).backward()
            norm = role.clip(1.0)
            role.step(1e-2)
            scaler.update()
            steps.append([norm, scaler.get_scale(), float(parallel.assembled(role.parameters[0].detach()).sum())])
    return steps


def unet(folder: Path) -> None:
    """LCM of a full UNet with its target."""
    from toy_process import Latents

    from stepdistill import families
    from stepdistill.methods.lcm import LCM, LCMConfig

    model = families.load(families.TeacherConfig(path=str(folder / "pipeline")))
    student = model.denoiser.full_student(embed_guidance=True)
    student.checkpoint_activations()
    cond = model.encode_prompts(["a red square", "blue"])
    method, data = LCM(LCMConfig(target_decay=0.5), student, model.denoiser), Latents(cond, model.uncond(cond))
    # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
    fit_in(folder / "lcm", method, 3, True, data, parallel="fsdp", learning_rate=1e-3, adam_epsilon=1e-2)


def main() -> None:
    torch.set_num_threads(1)
    parallel.UNIT = 20  # the toys' blocks are units, their first and last layers are not
    modes: dict[str, Callable[[Path], dict[str, Any]]] = {"toys": toys, "more": more}
    folder = Path(sys.argv[2])
    (folder / f"ends-{RANK}.json").write_text(json.dumps(modes[sys.argv[1]](folder)))


if __name__ == "__main__":
    main()
