"""Small methods, data sets and runs that the tests of the loop share. Everything is a function of its arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.batch import Batch
from stepdistill.diffusion.schedule import Tabulated
from stepdistill.method import Losses, Method, Phase
from stepdistill.networks.network import Module, Network
from stepdistill.randomness import StepRandom
from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.config import TrainConfig
from stepdistill.training.trainer import Trainer

EXACT = {"rtol": 0, "atol": 0}
MEAN, STD = 2.0, 0.3  # of the Gaussian that the closed forms are taken on


def sd_table() -> Tabulated:
    """Stable Diffusion's 1000 levels ("scaled_linear"), in float64."""
    return Tabulated(torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))


class Numbers:
    """Samples of N(MEAN, STD^2), [width] each, with the sample's index as `extra["index"]`."""

    def __init__(self, count: int = 64, width: int = 3) -> None:
        self.x0 = MEAN + STD * torch.randn(count, width, generator=torch.Generator().manual_seed(5))
        self.asked: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """The samples at `indices`."""
        self.asked.append(tuple(indices))
        return Batch(self.x0[list(indices)], {}, {}, rng, extra={"index": torch.tensor(indices)})


def network(seed: int, width: int = 3, out: int | None = None, dropout: float = 0.0) -> Module:
    """Two layers, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width if out is None else out)]
    return Module(nn.Sequential(*layers, nn.Dropout(dropout)))


class Regression(Method):
    """Denoises in one step; the noise comes from the batch's own generators. Keeps a counter, to be saved and restored."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        self.student = network(seed, dropout=dropout)
        self.total, self.history = torch.zeros((), dtype=torch.float64), [0]

    def networks(self) -> dict[str, Network]:
        return {"student": self.student}

    def training_step(self, batch: Batch) -> Losses:
        x0 = batch.data()
        noisy = x0 + 0.5 * batch.rng.normal("noise", x0.shape[1:])
        loss = (self.student(noisy) - x0).square().mean()
        return Losses({"regression": loss}, {"size": x0.detach().abs().mean()}, count=len(batch))

    def after_step(self) -> None:
        self.total += sum(p.sum() for p in self.student.trainable()).double()
        self.history.append(self.step)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.copy_(state["total"])
        self.history = list(state["history"])


class Uneven(Regression):
    """Means over as many items as each sample's index says: 0, 1, 2, ... of them."""

    def training_step(self, batch: Batch) -> Losses:
        x0, items = batch.data(), batch.extra["index"].float()
        errors = (self.student(x0) - x0).square().mean(1)
        loss = (errors * items).sum() / items.sum().clamp(min=1.0)
        return Losses({"regression": loss}, count=items.sum())


class Duel(Method):
    """A student against a critic that learns on every step and the student on every second: two phases, one memo."""

    def __init__(self, seed: int = 0, every: int = 2) -> None:
        self.student, self.critic, self.every = network(seed), network(seed + 1, out=1), every
        self.seen: list[tuple[str, tuple[str, ...], bool]] = []  # (phase, roles that require grad, the memo was filled)

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "critic": self.critic}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("critic",), self.criticise), Phase(("student",), self.improve, every=self.every))

    def _note(self, phase: str, batch: Batch) -> None:
        learning = [n for n, net in self.networks().items() if all(p.requires_grad for p in net.trainable())]
        self.seen.append((phase, tuple(learning), "noise" in batch.memo))

    def criticise(self, batch: Batch) -> Losses:
        self._note("critic", batch)
        x0 = batch.data()
        batch.memo["noise"] = batch.rng.normal("noise", x0.shape[1:])
        with torch.no_grad():
            fake = self.student(batch.memo["noise"])
        real = (1.0 - self.critic(x0)).relu().mean()
        return Losses({"hinge": real + (1.0 + self.critic(fake)).relu().mean()}, count=len(batch))

    def improve(self, batch: Batch) -> Losses:
        self._note("student", batch)
        fake = self.student(batch.memo["noise"])
        return Losses({"fool": -self.critic(fake).mean(), "size": fake.square().mean()}, count=len(batch))


class Ladder(Regression):
    """Three rounds; after each the student's weights become the teacher's."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.teacher, self.rung = self.student.frozen_copy(), 3

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "teacher": self.teacher}

    def next_round(self) -> bool:
        self.rung -= 1
        if self.rung:
            self.teacher.module.load_state_dict(self.student.module.state_dict())
        return self.rung > 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rung": self.rung}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rung = state["rung"]


class Killed(BaseException):
    """What stands for a kill inside one process."""

    @classmethod
    def now(cls) -> None:
        """Raises it."""
        raise cls


def options(**changes: Any) -> TrainConfig:
    """A short run on 8 samples a step; every run in one process has the same precision, as Accelerate wants it."""
    defaults = {"max_train_steps": 6, "train_batch_size": 8, "learning_rate": 1e-2, "mixed_precision": "no"}
    return TrainConfig(**{**defaults, "checkpointing_steps": 100, **changes})


def train(folder: Path, method: Method | None = None, data: Any = None, **changes: Any) -> Method:
    """One fit of `method` into `folder`."""
    method = Regression() if method is None else method
    Trainer(options(**changes), folder).fit(method, Numbers() if data is None else data)
    return method


def rows(folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl, without the seconds unless asked for."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found if timed else [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def saved(folder: Path, name: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the newest checkpoint by "file/name", and its JSON state."""
    checkpoint = CheckpointStore(folder / "checkpoints" / name).find(strict=True)
    assert checkpoint is not None
    files = sorted(p.stem for p in checkpoint.path.glob("*.safetensors"))
    return {f"{f}/{n}": v for f in files for n, v in checkpoint.tensors(f).items()}, checkpoint.state


def same(folder: Path, other: Path) -> None:
    """The same bits in every tensor of the last checkpoint, the same state, the same metrics."""
    (tensors, state), (wanted, wanted_state) = saved(folder), saved(other)
    assert "student.optimizer/state.0.exp_avg" in wanted and any(n.startswith("student/") for n in wanted)
    assert_close(tensors, wanted, **EXACT)
    assert state == wanted_state
    assert rows(folder) == rows(other)


def weights(method: Method) -> dict[str, Tensor]:
    """Copies of all weights by "role/name"."""
    return {f"{r}/{n}": v.clone() for r, net in method.networks().items() for n, v in net.state().items()}


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], bool]]]:
    """(inputs, whether grad was enabled) of each forward of `module` within it."""
    calls: list[tuple[tuple[Any, ...], bool]] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((inputs, torch.is_grad_enabled()))

    handle = module.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def stopping_after(method: Method, step: int, stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` at the end of step number `step` (from 1), before it is logged or saved."""
    original = method.after_step

    def after_step() -> None:
        original()
        if method.step + 1 == step:
            stop()

    method.after_step = after_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        method.after_step = original  # type: ignore[method-assign]
