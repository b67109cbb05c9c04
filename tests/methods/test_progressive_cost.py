"""What a ladder costs, counted in whole runs: forwards of each step, and bytes of weights in each rung."""

import weakref
from pathlib import Path

import pytest
import torch
from ladders import Net, Pushed, batch, config, ladder
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, options

from stepdistill.batch import Cond
from stepdistill.methods.guidance_distill import GuidanceDistill
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.lora import LoraSpec
from stepdistill.networks.network import Network, parameter_bytes
from stepdistill.training.trainer import Trainer

GUIDED = {"w_min": 2.0, "w_max": 2.0}
STEPS = 2  # of a round
Call = tuple[str, int, bool]  # (network, batch size, whether grad was enabled)


def noted(method: GuidanceDistill | Progressive, calls: list[Call]) -> None:
    """From now on each forward of the method's networks, and of copies made of them, is added to `calls`."""
    student = method.student

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        is_student = module is student.module if student.adapters is None else student.adapters.current == "student"
        calls.append(("student" if is_student else "teacher", len(inputs[0]), torch.is_grad_enabled()))

    for module in {student.module, method.teacher.module}:
        module.register_forward_pre_hook(note)  # which a deep copy of the module has too


def rungs(trainer: Trainer, method: Progressive, calls: list[Call]) -> list[list[Call]]:
    """The calls of each rung of a whole ladder."""
    found: list[list[Call]] = []

    def rung(_: int) -> None:
        found.append(calls[:])
        calls.clear()

    trainer.fit(method, Pushed(), "ladder", on_round=rung)
    return found


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("size", [4, 8])
def test_each_step_of_a_run_costs_k_forwards_of_the_teacher_and_one_of_the_student(
    tmp_path: Path, kind: str, size: int
) -> None:
    """8 samples a step in micro-batches of `size`; 20 -> 4 -> 2 -> 1 steps, of a guided teacher at first."""
    calls: list[Call] = []
    method, parts = ladder(kind, teacher_steps=20, **GUIDED), 8 // size
    noted(method, calls)
    train = options(max_train_steps=STEPS, train_batch_size=size, gradient_accumulation_steps=parts, ema_decay=0.5)
    found = rungs(Trainer(train, tmp_path), method, calls)
    one = [("student", size, True)]
    first, later = [("teacher", 2 * size, False)] * 5 + one, [("teacher", size, False)] * 2 + one
    assert found == [first * STEPS * parts, later * STEPS * parts, later * STEPS * parts]
    assert calls == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_after_guidance_distillation_the_first_rung_costs_no_second_evaluation(tmp_path: Path, kind: str) -> None:
    """As the recipe has it: the ladder's first teacher is a copy of the student that learned guidance."""
    teacher, calls = Net(), list[Call]()
    student = teacher.full_student() if kind == "full" else teacher.with_lora(LoraSpec(2, 2.0, Net.lora_targets))
    trainer = Trainer(options(max_train_steps=STEPS, train_batch_size=8), tmp_path)
    guidance = GuidanceDistill(config(**GUIDED).guidance(), student, teacher)
    noted(guidance, calls)
    trainer.fit(guidance, Pushed(), "guidance")
    one = [("student", 8, True)]
    assert calls == ([("teacher", 16, False)] + one) * STEPS
    calls.clear()
    found = rungs(trainer, Progressive(config(teacher_steps=20, **GUIDED), student), calls)
    assert found == [([("teacher", 8, False)] * k + one) * STEPS for k in (5, 2, 2)]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_teachers_one_forward_is_of_prompts_and_of_no_prompts(kind: str) -> None:
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    class Asked(Net):
        def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            asked.append((x_t, t, cond["push"]))
            return super().call(x_t, t, cond)

    method = ladder(kind, **GUIDED)
    method.teacher.__class__ = Asked
    push = torch.linspace(0.1, 0.8, 8)
    given = batch(8, cond={"push": push}, uncond={"push": torch.zeros(8)})
    given.x0 = given.data().float()
    method.training_step(given)
    assert len(asked) == 2
    for x_t, t, pushed in asked:
        assert_close(x_t[:8], x_t[8:], **EXACT)
        assert_close(t[:8], t[8:], **EXACT)
        assert_close(pushed, torch.cat([push, torch.zeros(8)]), **EXACT)


# -- memory ------------------------------------------------------------------------------------------------------------


def held(method: Progressive) -> int:
    """Bytes of the weights of all networks that a method has in hand, what they share counted once."""
    return parameter_bytes(nn.ModuleList([v.module for v in vars(method).values() if isinstance(v, Network)]))


@pytest.mark.parametrize("given", [True, False])
def test_two_networks_are_held_in_every_rung(given: bool) -> None:
    teacher = Net()
    size, student = parameter_bytes(teacher.module), teacher.full_student()
    assert size == 4 * (4 * 8 + 8 + 8 * 3 + 3)
    method = Progressive(config(**GUIDED), student, teacher if given else None)
    first = weakref.ref(method.teacher.module)
    assert held(method) == 2 * size
    teacher = Net()  # the other one is the method's alone
    for _ in range(2):
        assert method.next_round()
        assert held(method) == 2 * size
        assert (first() is None) == given, "the first teacher is let go of, and a copy is copied into"


@pytest.mark.parametrize("given", [True, False])
def test_a_lora_ladder_holds_one_base_and_at_most_two_adapters(given: bool) -> None:
    base = parameter_bytes(Net().module)
    method = ladder("lora", given)
    adapter = sum(4 * p.numel() for p in method.student.trainable())
    assert adapter == 4 * 2 * (4 + 8 + 8 + 3)  # rank 2
    assert held(method) == base + (1 if given else 2) * adapter
    for _ in range(2):
        assert method.next_round()
        assert held(method) == base + 2 * adapter
