"""The loop: what one step, one phase, one round and one fit do. Killing and resuming is in test_resume.py."""

import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import (
    EXACT,
    MEAN,
    STD,
    Duel,
    Numbers,
    Regression,
    Uneven,
    network,
    options,
    rows,
    saved,
    sd_table,
    stopping_after,
    train,
    weights,
)  # fmt: skip

from stepdistill.batch import Batch, Cond
from stepdistill.errors import InputError
from stepdistill.method import Losses, Method, Phase
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.networks.network import Network
from stepdistill.randomness import StepRandom
from stepdistill.training.config import TrainConfig
from stepdistill.training.optimization import NonFiniteError, lr_factor
from stepdistill.training.trainer import Trainer

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Regression, Uneven, Duel])
def test_accumulation_changes_nothing(tmp_path: Path, kind: type[Method]) -> None:
    """The same samples, noise, losses and weights whether 8 samples come as 1x8, 2x4, 4x2 or 8x1."""
    runs = []
    for size, parts in SPLITS:
        folder, data = tmp_path / f"{size}x{parts}", Numbers(count=20)
        method = train(
            folder, kind(), data, train_batch_size=size, gradient_accumulation_steps=parts, max_train_steps=8
        )
        runs.append((weights(method), rows(folder), [i for asked in data.asked for i in asked]))
    assert not torch.equal(next(iter(runs[0][0].values())), next(iter(weights(kind()).values())))
    for run in runs[1:]:
        assert_close(run[0], runs[0][0], rtol=1e-4, atol=1e-6)
        assert_close(run[1], runs[0][1], rtol=1e-4, atol=1e-6)
        assert run[2] == runs[0][2]


def test_means_over_items_are_true_means_over_the_global_batch(tmp_path: Path) -> None:
    """One step of plain descent, against the loss of all 8 samples at once: no mean of micro-batch means."""
    method, data = Uneven(), Numbers(count=8)
    items = torch.arange(8.0)
    errors = (method.student(data.x0) - data.x0).square().mean(1)
    whole = (errors * items).sum() / items.sum()
    whole.backward()
    norm = torch.cat([p.grad.flatten() for p in method.student.trainable()]).norm()
    method.student.module.zero_grad()
    train(tmp_path, method, data, train_batch_size=2, gradient_accumulation_steps=4, max_train_steps=1)
    (row,) = rows(tmp_path)
    assert_close(row["loss"], whole.item(), rtol=1e-6, atol=0)
    assert_close(row["grad_norm"], float(norm), rtol=1e-5, atol=0)


def test_a_row_of_metrics_for_each_step(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=4, lr_scheduler="linear", learning_rate=0.5)
    found = rows(tmp_path, timed=True)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in found] == [0.5, 0.375, 0.25, 0.125]
    for row in found:
        assert set(row) == {"step", "loss", "regression", "size", "grad_norm", "learning_rate", "seconds"}
        assert row["loss"] == row["regression"] and row["grad_norm"] > 0 and row["seconds"] >= 0


def test_every_epoch_shows_each_sample_once(tmp_path: Path) -> None:
    data = Numbers(count=12)
    train(tmp_path, Regression(), data, train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=3)
    seen = [i for asked in data.asked for i in asked]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


def test_the_steps_are_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    """Three steps by hand with torch's own optimizer."""
    clipping = {"max_grad_norm": 0.05, "adam_beta2": 0.9, "adam_epsilon": 0.1, "max_train_steps": 3}
    method = train(tmp_path, **clipping)
    other, data = Regression(), Numbers()
    optimizer = torch.optim.AdamW(other.student.trainable(), lr=1e-2, betas=(0.9, 0.9), eps=0.1, weight_decay=0.01)
    norms = []
    for asked, step in zip(trained_on(tmp_path / "again", clipping), range(3), strict=True):
        other.training_step(data.batch(asked, StepRandom(0, step, range(8)))).total.backward()
        norms.append(float(nn.utils.clip_grad_norm_(other.student.trainable(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(method), weights(other), rtol=1e-6, atol=1e-7)
    assert_close([row["grad_norm"] for row in rows(tmp_path)], norms, rtol=1e-5, atol=0)
    assert min(norms) > 0.05


def trained_on(folder: Path, changes: dict[str, Any]) -> list[tuple[int, ...]]:
    data = Numbers()
    train(folder, Regression(), data, **changes)
    return data.asked


class Global(Duel):
    """Draws from the global generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__(every=1)
        self.drawn: list[float] = []

    def _note(self, phase: str, batch: Batch) -> None:
        self.drawn.append(torch.rand(()).item())


def test_the_global_generator_is_another_in_each_step_phase_and_micro_batch(tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("once", 0), ("again", 0), ("seed", 1)):
        method = Global()
        changes = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "train_batch_size": 4, "seed": seed}
        train(tmp_path / name, method, **changes)
        drawn.append(method.drawn)
        torch.rand(7)
    assert len(set(drawn[0])) == 8 and drawn[1] == drawn[0]
    assert not set(drawn[2]) & set(drawn[0])


# -- phases -----------------------------------------------------------------------------------------------------------


def test_phases_share_a_memo_and_run_as_often_as_they_say(tmp_path: Path) -> None:
    method = Duel(every=3)
    train(tmp_path, method, max_train_steps=4, train_batch_size=4, gradient_accumulation_steps=2)
    critic, student = [("critic", ("critic",), False)] * 2, [("student", ("student",), True)] * 2
    assert method.seen == [*critic, *student, *critic, *critic, *critic, *student]
    found = rows(tmp_path)
    assert [row["step"] for row in found if "fool" in row] == [1, 4]
    assert [row["step"] for row in found if "grad_norm/critic" in row] == [1, 2, 3, 4]
    assert all(row["loss"] == row.get("loss/student", row["loss/critic"]) for row in found)
    assert_close(found[0]["loss/student"], found[0]["fool"] + found[0]["size"], rtol=1e-5, atol=0)


def test_a_phase_moves_its_own_roles_and_leaves_no_gradients(tmp_path: Path) -> None:
    method = Duel(every=2)
    moved: list[set[str]] = []
    last = weights(method)

    def look() -> None:
        nonlocal last
        now = weights(method)
        moved.append({name.split("/")[0] for name in now if not torch.equal(now[name], last[name])})
        last = now
        assert all(p.grad is None for net in method.networks().values() for p in net.trainable())

    method.after_step = look
    train(tmp_path, method, max_train_steps=3)
    assert moved == [{"critic", "student"}, {"critic"}, {"critic", "student"}]


class Watched(Duel):
    """Looks at the other role's gradients during the backward of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []
        for role, net in self.networks().items():
            for parameter in net.trainable():
                parameter.register_hook(lambda _, role=role: self.touched.append(role))


def test_no_gradient_is_computed_for_frozen_roles(tmp_path: Path) -> None:
    method = Watched()
    train(tmp_path, method, max_train_steps=2)  # critic, student; critic
    # hooks fire once a backward: 4 parameters each, the critic's on both steps, the student's on the first
    assert method.touched == ["critic"] * 4 + ["student"] * 4 + ["critic"] * 4


class Recycled(Numbers):
    """A data set that hands out one Batch again and again."""

    def __init__(self) -> None:
        super().__init__(count=8)
        self.one: Batch | None = None

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        self.one = self.one or super().batch(range(8), rng)
        return self.one


def test_the_memo_ends_with_the_step(tmp_path: Path) -> None:
    method, data = Duel(every=1), Recycled()
    train(tmp_path, method, data, max_train_steps=2)
    assert [filled for _, _, filled in method.seen] == [False, True, False, True]
    assert data.one is not None and data.one.memo == {}


def test_flags_of_parameters_come_back(tmp_path: Path) -> None:
    method = Duel()
    frozen = method.student.module[0].bias.requires_grad_(False)
    method.student = type(method.student)(method.student.module)  # what trains is fixed at construction
    before, value = {n: p.requires_grad for n, p in flags(method)}, frozen.clone()
    train(tmp_path, method, max_train_steps=3)
    assert {n: p.requires_grad for n, p in flags(method)} == before
    assert_close(frozen, value, **EXACT)


def flags(method: Method) -> list[tuple[str, nn.Parameter]]:
    return [(f"{r}.{n}", p) for r, net in method.networks().items() for n, p in net.module.named_parameters()]


class Now_and_then(Regression):
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("student",), self.training_step, every=2),)


def test_a_step_without_a_phase_is_a_row_without_a_loss(tmp_path: Path) -> None:
    train(tmp_path, Now_and_then(), max_train_steps=3)
    assert ["loss" in row for row in rows(tmp_path)] == [True, False, True]


# -- what is not a number -----------------------------------------------------------------------------------------------


class Broken(Duel):
    """On its third step one of these is NaN: the loss, or the critic's gradient of a finite loss, or a metric."""

    def __init__(self, what: str) -> None:
        super().__init__(every=1)
        self.what = what

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("student", "critic"), self.both),)

    def both(self, batch: Batch) -> Losses:
        x0 = batch.data()
        loss = (self.student(x0) - x0).square().mean() + self.critic(x0).square().mean()
        bad = self.step == 2
        nothing = (0.0 * self.critic(x0).sum()).sqrt() if bad and self.what == "gradient" else 0.0  # sqrt'(0) * 0
        metric = torch.tensor(math.nan if bad and self.what == "metric" else 1.0)
        factor = {"loss": math.nan, "infinite": math.inf}.get(self.what, 1.0) if bad else 1.0
        return Losses({"sum": loss * factor + nothing}, {"metric": metric}, count=len(batch))


@pytest.mark.parametrize(
    ("what", "named"), [("loss", "loss"), ("infinite", "loss"), ("gradient", "gradient norm of critic")]
)
def test_what_is_not_finite_raises_before_the_step(tmp_path: Path, what: str, named: str) -> None:
    good = train(tmp_path / "two", Broken(what), max_train_steps=2)
    method = Broken(what)
    with pytest.raises(NonFiniteError, match=f"{named}.*is not finite at step 3.*learning_rate"):
        train(tmp_path / "three", method, max_train_steps=5, train_batch_size=4, gradient_accumulation_steps=2)
    # 2x4 and 1x8 differ in rounding alone, and neither role moved, the student whose gradient was fine included
    assert_close(weights(method), weights(good), rtol=1e-4, atol=1e-6)
    assert [row["step"] for row in rows(tmp_path / "three")] == [1, 2]
    assert all(p.requires_grad for net in method.networks().values() for p in net.trainable())


def test_a_metric_that_is_not_a_number_is_only_told(tmp_path: Path) -> None:
    train(tmp_path, Broken("metric"), max_train_steps=4)
    assert [row["metric"] for row in rows(tmp_path)] == [1.0, 1.0, None, 1.0]


# -- EMA --------------------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_validated_and_what_remains(tmp_path: Path) -> None:
    method, trained, shown = Regression(), [], []
    original = method.after_step
    method.after_step = lambda: (original(), trained.append(weights(method)))[0]
    start = weights(method)
    config = options(ema_decay=0.5, validation_steps=2, max_train_steps=5)
    Trainer(config, tmp_path).fit(method, Numbers(), on_validate=lambda step: shown.append((step, weights(method))))
    average, averages = start, []
    for n, now in enumerate(trained):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
        averages.append(average)
    assert [step for step, _ in shown] == [2, 4]
    assert_close(shown[0][1], averages[1], rtol=1e-5, atol=1e-6)
    assert_close(shown[1][1], averages[3], rtol=1e-5, atol=1e-6)
    assert_close(weights(method), averages[4], rtol=1e-5, atol=1e-6)
    tensors, _ = saved(tmp_path)
    assert_close({n: v for n, v in tensors.items() if n.startswith("student/")}, trained[4], **EXACT)
    assert_close({n.replace(".ema", ""): v for n, v in tensors.items() if ".ema" in n}, weights(method), **EXACT)


def test_validation_does_not_touch_training(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", Regression(dropout=0.5), ema_decay=0.9)
    method, asked = Regression(dropout=0.5), []

    def on_validate(step: int) -> None:
        asked.append((step, torch.is_grad_enabled()))
        torch.manual_seed(step)
        torch.rand(step)

    Trainer(options(validation_steps=2, ema_decay=0.9), tmp_path / "told").fit(
        method, Numbers(), on_validate=on_validate
    )
    assert asked == [(2, False), (4, False), (6, False)]
    assert_close(weights(method), weights(plain), **EXACT)


# -- rounds and fits ----------------------------------------------------------------------------------------------------


class Ladder(Regression):
    """Three rounds; after each the student's weights become the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.rung = self.student.frozen_copy(), 3

    def networks(self) -> dict[str, Network]:
        return {"student": self.student, "teacher": self.teacher}

    def next_round(self) -> bool:
        self.rung -= 1
        if self.rung == 0:
            return False
        self.teacher.module.load_state_dict(self.student.module.state_dict())
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rung": self.rung}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rung = state["rung"]


def test_a_round_starts_afresh(tmp_path: Path) -> None:
    method, ends = Ladder(), []
    config = options(
        max_train_steps=3, ema_decay=0.5, lr_scheduler="linear", learning_rate=0.3, checkpoints_total_limit=None
    )
    Trainer(config, tmp_path).fit(method, Numbers(), on_round=lambda n: ends.append((n, weights(method))))
    assert [n for n, _ in ends] == [0, 1, 2]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10)), "the global step counts on"
    assert_close([row["learning_rate"] for row in rows(tmp_path)], [0.3, 0.2, 0.1] * 3, rtol=1e-12, atol=0)
    tensors, state = saved(tmp_path)
    assert (state["round"], state["round_start"], state["ema_updates"]) == (2, 6, 3)
    steps = [v for n, v in tensors.items() if n.startswith("student.optimizer/") and n.endswith("step")]
    assert_close(steps, [torch.tensor(3.0)] * 4, **EXACT)
    # the teacher of round 2 is the average that round 1 ended with, which on_round was shown
    student = {n: v for n, v in ends[1][1].items() if n.startswith("student")}
    assert_close(
        {n.replace("teacher", "student"): v for n, v in weights(method).items() if "teacher" in n}, student, **EXACT
    )


def test_fits_follow_each_other_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    def run(resume: str | None, second_steps: int, stop: int | None = None) -> tuple[Method, Method, list[str]]:
        first, second, log = Regression(seed=1), Duel(seed=2), []
        config = options(max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint=resume, ema_decay=0.5)
        trainer = Trainer(config, tmp_path)
        first.training_step = spy(first.training_step, log, "first")
        second.criticise = spy(second.criticise, log, "second")
        trainer.fit(first, Numbers(), "warm_up", on_round=lambda n: log.append(f"round {n}"))
        if stop is None:
            trainer.fit(second, Numbers(), "ladder", steps=second_steps)
        else:
            with stopping_after(second, stop, Killed.now), pytest.raises(Killed):
                trainer.fit(second, Numbers(), "ladder", steps=second_steps)
        return first, second, log

    first, _, log = run(None, 5, stop=8)
    assert log == ["first"] * 4 + ["round 0"] + ["second"] * 4
    again, _, log = run("latest", 5)
    assert log == ["round 0"] + ["second"] * 3, "steps 7, 8, 9 of the second, none of the first"
    assert_close(weights(again), weights(first), **EXACT)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    _, _, log = run("latest", 5)
    assert log == ["round 0"], "nothing is left to do, and nothing that was told is taken back"
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["ladder", "warm_up"]


class Killed(BaseException):
    @classmethod
    def now(cls) -> None:
        raise cls


def spy(function: Any, log: list[str], word: str) -> Any:
    def called(batch: Batch) -> Losses:
        log.append(word)
        return function(batch)

    return called


def test_the_names_of_fits(tmp_path: Path) -> None:
    trainer = Trainer(options(max_train_steps=1), tmp_path)
    trainer.fit(Regression(), Numbers(), "a")
    with pytest.raises(ValueError, match="'a' already"):
        trainer.fit(Regression(), Numbers(), "a")
    with pytest.raises(ValueError, match="no number"):
        trainer.fit(Regression(), Numbers(), "12")


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one sample"):
        train(tmp_path, Regression(), Numbers(count=0))


class Astray(Regression):
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("critic",), self.training_step),)


def test_a_phase_of_an_unknown_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['student'\], got \['critic'\]"):
        train(tmp_path, Astray())


def test_no_steps_are_no_steps(tmp_path: Path) -> None:
    method = Regression()
    Trainer(options(), tmp_path).fit(method, Numbers(), steps=0)
    assert_close(weights(method), weights(Regression()), **EXACT)


# -- the run folder and signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leftover", ["checkpoints", "metrics.jsonl"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path, leftover: str) -> None:
    (tmp_path / leftover).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="resume_from_checkpoint latest"):
        Trainer(options(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_config_lies_beside_the_run(tmp_path: Path) -> None:
    Trainer(options(max_train_steps=1), tmp_path / "run", "seed: 0\n").fit(Regression(), Numbers())
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"
    assert (tmp_path / "run" / "checkpoints" / "1" / "manifest.json").is_file()


def test_sigterm_saves_this_step_and_exits_with_143(tmp_path: Path) -> None:
    method, handler = Regression(), signal.getsignal(signal.SIGTERM)
    with stopping_after(method, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(SystemExit) as stopped:
        train(tmp_path, method, max_train_steps=6)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert saved(tmp_path)[1]["fit"] == "" and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    method = train(tmp_path, resume_from_checkpoint="latest")
    whole = train(tmp_path / "whole")
    assert_close(weights(method), weights(whole), **EXACT)
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_sigterm_during_a_callback_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        Trainer(options(), tmp_path).fit(
            Regression(), Numbers(), on_round=lambda _: os.kill(os.getpid(), signal.SIGTERM)
        )
    assert stopped.value.code == 143 and (tmp_path / "checkpoints" / "6").is_dir()


def test_the_sizes_that_recipes_ask_for(tmp_path: Path) -> None:
    trainer = Trainer(options(train_batch_size=4, gradient_accumulation_steps=3), tmp_path)
    assert (trainer.global_batch_size, trainer.is_main, trainer.weight_dtype) == (12, True, torch.float32)
    assert trainer.device.type in ("cpu", "cuda", "mps")
    assert lr_factor(TrainConfig(), 0, 10) == 1.0


# -- precision and memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate fixes the precision once in a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Affine(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t.to(self.net[0].weight.dtype))


def test_in_bf16_the_adapter_stays_in_float32(tmp_path: Path, fresh_accelerate: None) -> None:
    trainer = Trainer(options(max_train_steps=3, mixed_precision="bf16"), tmp_path)
    assert trainer.weight_dtype == torch.bfloat16
    base = Affine(network(0).module.to(torch.bfloat16).requires_grad_(False), sd_table(), "eps")
    student = base.with_lora(LoraSpec(2, 2.0, ("0", "2")))
    before = weights_of(student), {n: p.clone() for n, p in base.module.named_parameters() if "lora" not in n}
    dtypes: list[torch.dtype] = []
    base.module[1].register_forward_pre_hook(lambda _, x: dtypes.append(x[0].dtype))
    trainer.fit(LCM(LCMConfig(), student, base), Numbers())
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in student.trainable()} == {torch.float32}
    assert {v.dtype for n, v in saved(tmp_path)[0].items() if n.startswith("student")} == {torch.float32}
    assert all(not torch.equal(v, before[0][n]) for n, v in weights_of(student).items() if "lora_B" in n)
    assert_close({n: p for n, p in base.module.named_parameters() if "lora" not in n}, before[1], **EXACT)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows(tmp_path))


def weights_of(net: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state().items()}


def test_another_precision_in_the_same_process_is_an_input_error(tmp_path: Path) -> None:
    Trainer(options(), tmp_path)
    with pytest.raises(InputError, match="mixed_precision"):
        Trainer(options(mixed_precision="bf16"), tmp_path)


class Prompted(Numbers):
    """Latents and prompts for the tiny Stable Diffusion."""

    def __init__(self) -> None:
        super().__init__(count=4, width=4 * 4 * 4)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        x0 = (self.x0[list(indices)] - MEAN) / STD
        text = torch.linspace(-1, 1, 24 * 16).reshape(1, 24, 16).expand(len(indices), -1, -1)
        return Batch(x0.reshape(-1, 4, 4, 4), {"prompt_embeds": text}, {"prompt_embeds": -text}, rng)


def test_gradient_checkpointing_recomputes_the_student_and_changes_nothing(tmp_path: Path) -> None:
    """Backward runs the blocks again when the teacher's turn is long over: the adapter must be on by then."""
    from tiny import _unet

    from stepdistill.families.unet import LCM_TARGETS, UNet

    runs, forwards = [], []
    for checkpointing in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher = UNet(_unet().eval(), sd_table(), "eps")
        student = teacher.with_lora(LoraSpec(2, 2.0, LCM_TARGETS))
        for i, parameter in enumerate(student.trainable()):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
        if checkpointing:
            student.checkpoint_activations()
        count: list[str | None] = []
        block = teacher.module.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, c=count, t=teacher: c.append(t.adapters.current))
        folder = tmp_path / str(checkpointing)
        train(folder, LCM(LCMConfig(), student, teacher), Prompted(), max_train_steps=2, train_batch_size=2)
        runs.append((weights_of(student), rows(folder)))
        forwards.append(count)
    assert forwards == [["student", None, "student"] * 2, ["student", None, "student", "student"] * 2]
    assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)
