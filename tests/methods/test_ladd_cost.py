"""What LADD costs, counted in whole runs: forwards and backwards of each step, and bytes of weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import Convolutional, Prompted, batch, game, gradients, learning
from torch import Tensor, nn
from toys import Killed, options, rows, same, stopping_after, weights

from stepdistill.methods.ladd import LADD
from stepdistill.networks.network import parameter_bytes
from stepdistill.training.trainer import Trainer

Call = tuple[str, int, bool, bool]  # (network, batch size, whether grad was enabled, whether x_t required grad)


def noted(method: LADD) -> tuple[list[Call], list[str]]:
    """Lists that each forward of student and teacher is added to, and each gradient that comes out of a forward."""
    calls, gradients = list[Call](), list[str]()
    student = method.student

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        is_student = module is student.module if student.adapters is None else student.adapters.current == "student"
        name = "student" if is_student else "teacher"
        calls.append((name, len(inputs[0]), torch.is_grad_enabled(), inputs[0].requires_grad))
        if output.requires_grad and is_student:
            output.register_hook(lambda _: gradients.append(name))
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: gradients.append(f"into {name}"))

    for module in {student.module, method.teacher.module}:
        module.register_forward_hook(note)
    return calls, gradients


def run(folder: Path, method: LADD, steps: int = 1, size: int = 8, parts: int = 1, **changes: Any) -> None:
    train = options(
        max_train_steps=steps, train_batch_size=size, gradient_accumulation_steps=parts, ema_decay=0.5, **changes
    )
    Trainer(train, folder).fit(method, Prompted())


def step(size: int, looks: int = 2, more: tuple[Call, ...] = (), guard: bool = False) -> tuple[list[Call], list[Call]]:
    """The calls of a micro-batch in the discriminator's phase and in the student's."""
    looking = [("student", size, False, False)] * 2 if guard else []
    judged: list[Call] = [("student", size, False, False), ("teacher", looks * size, False, False), *looking]
    return judged, [("student", size, True, False), ("teacher", size, True, True), *more]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("parts", [1, 2])
def test_each_step_costs_two_forwards_of_each_network_and_one_backward(tmp_path: Path, kind: str, parts: int) -> None:
    method, size = game(kind, guard_every=0, r1_every=2), 8 // parts
    calls, gradients = noted(method)
    run(tmp_path, method, 3, size, parts)
    judged, deceived = step(size)
    assert calls == (judged * parts + deceived * parts) * 3
    assert gradients == ["into teacher", "student"] * parts * 3


EXTRAS: dict[str, tuple[dict[str, Any], int, tuple[Call, ...]]] = {
    "approximate R1": ({"approximate_r1": 1.0}, 3, ()),
    "distillation": ({"distillation": 1.0}, 2, (("teacher", 8, False, False),)),
    "guided distillation": ({"distillation": 1.0, "w": 2.0}, 2, (("teacher", 16, False, False),)),
}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_the_options_add(tmp_path: Path, kind: str, extra: str) -> None:
    given, looks, more = EXTRAS[extra]
    method = game(kind, guard_every=0, r1_every=2, **given)
    calls, gradients = noted(method)
    run(tmp_path, method, 2)
    lazy = step(8, 2, more)
    assert calls == [*sum(step(8, looks, more), []), *sum(lazy, [])], "lazily, as R1 is"
    assert gradients == ["into teacher", "student"] * 2


def test_the_guard_looks_with_two_forwards_of_the_student_now_and_then(tmp_path: Path) -> None:
    method = game(guard_every=2)
    calls, _ = noted(method)
    run(tmp_path, method, 3)
    assert calls == sum([sum(step(8, guard=guard), []) for guard in (True, False, True)], [])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_base_is_held_with_a_lora_and_two_networks_with_a_full_student(kind: str) -> None:
    size = parameter_bytes(Convolutional().module)
    method = game(kind)
    modules = [method.teacher.module, *(network.module for network in method.networks().values())]
    trained = {name: sum(4 * p.numel() for p in n.trainable()) for name, n in method.networks().items()}
    assert parameter_bytes(nn.ModuleList(modules)) == size + trained["student"] + trained["discriminator"]
    assert (trained["student"] == size) == (kind == "full")


# -- phases that don't run on every step -----------------------------------------------------------------------------------


class Paced(LADD):
    """Each phase on every so many steps."""

    every = (1, 1)

    def phases(self) -> Any:
        return tuple(replace(phase, every=n) for phase, n in zip(super().phases(), self.every, strict=True))


def paced(kind: str, every: tuple[int, int], **given: Any) -> LADD:
    method = game(kind, **given)
    method.__class__ = type("Paced", (Paced,), {"every": every})
    return method


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("every", [(1, 3), (2, 1), (3, 2)])
def test_a_phase_that_is_skipped_costs_and_moves_nothing(tmp_path: Path, kind: str, every: tuple[int, int]) -> None:
    method = paced(kind, every, guard_every=2, r1_every=1)
    calls, _ = noted(method)
    seen: list[dict[str, Tensor]] = [weights(method)]
    counts, after = [0], method.after_step

    def after_step() -> None:
        seen.append(weights(method))
        counts.append(len(calls))
        after()

    method.after_step = after_step  # type: ignore[method-assign]
    run(tmp_path, method, 6)
    for number, row in enumerate(rows(tmp_path)):
        plays = {role: number % n == 0 for role, n in zip(("discriminator", "student"), every, strict=True)}
        for role, played in plays.items():
            trained = method.networks()[role].named_trainable()
            before, now = ({n: w[f"{role}/{n}"] for n in trained} for w in seen[number : number + 2])
            assert any(not torch.equal(before[n], now[n]) for n in trained) == played
            assert (f"loss/{role}" in row) == played
        guard = plays["discriminator"] and number % 2 == 0
        judged, deceived = step(8, guard=guard)
        wanted = judged * plays["discriminator"] + deceived * plays["student"]
        assert calls[counts[number] : counts[number + 1]] == wanted
        assert ("diversity" in row) == guard and ("accuracy" in row) == plays["discriminator"]
    assert method.taken == 6


@pytest.mark.parametrize("every", [(1, 3), (2, 1)])
def test_skipped_phases_are_skipped_the_same_after_a_kill(tmp_path: Path, every: tuple[int, int]) -> None:
    given = {"guard_every": 2, "r1_every": 2, "warmup_steps": 3}
    run(tmp_path / "whole", paced("full", every, **given), 6, checkpointing_steps=2)
    dying = paced("full", every, **given)
    with pytest.raises(Killed), stopping_after(dying, 5, Killed.now):
        run(tmp_path / "killed", dying, 6, checkpointing_steps=2)
    again = paced("full", every, seed=4, **given)
    run(tmp_path / "killed", again, 6, checkpointing_steps=2, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")


# -- small batches, half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_batch_of_one_trains(tmp_path: Path, kind: str) -> None:
    method = game(kind, guard_every=1, approximate_r1=1.0, distillation=1.0, w=0.5)
    run(tmp_path, method, 2, size=1)
    numbers = [value for row in rows(tmp_path) for value in row.values()]
    assert len(rows(tmp_path)) == 2 and all(torch.isfinite(torch.tensor(value)) for value in numbers)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_heads_see_and_compute_float32_under_autocast(base: torch.dtype) -> None:
    """In both phases, with a teacher in bf16 as recipes load it too; the gradient comes back to the student."""
    teacher = Convolutional()
    teacher.module.to(base)
    method, one = game("full", teacher, approximate_r1=1.0), batch(1)
    seen: list[torch.dtype] = []

    def look(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend(value.dtype for value in (*inputs, output))

    for part in method.discriminator.module.modules():
        part.register_forward_hook(look) if isinstance(part, (nn.Conv2d, nn.Linear, nn.LayerNorm)) else None
    phases: dict[str, Callable[[Any], Any]] = {"discriminator": method.discriminate, "student": method.deceive}
    for role, loss in phases.items():
        with learning(method, role):
            with torch.autocast("cpu", torch.bfloat16):
                losses = loss(one)
            losses.total.backward()
        assert losses.total.dtype == torch.float32
        found = gradients(method.networks()[role])
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in found)
        assert any(float(g.abs().max()) > 0 for g in found)
    assert len(seen) > 50 and set(seen) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        maps = method.features(torch.randn(1, 1, 4, 4), torch.full((1,), 0.5).double(), one.cond)
    assert {m.dtype for m in maps} == {torch.bfloat16}, "the features themselves are in half precision"
