"""Named adapters: the strength in closed form, and that the teacher is the base to the bit whatever the student does."""

from pathlib import Path

import pytest
import torch
from students import ATTENTION, MODULES, inputs, look, opened, run_unet, student_of, train
from torch import nn

from stepdistill.config import CommaList
from stepdistill.errors import InputError
from stepdistill.families.unet import LCM_TARGETS
from stepdistill.networks.lora import Adapters, LoraSpec, StudentConfig
from stepdistill.networks.network import Module, parameter_bytes


def linear(alpha: float = 6.0) -> tuple[Module, Adapters]:
    adapters = Adapters(nn.Sequential(nn.Linear(5, 3)))
    adapters.attach("student", LoraSpec(2, alpha, ("0",)))
    return Module(adapters.module, adapters, "student"), adapters


@pytest.mark.parametrize("alpha", [2.0, 6.0, 0.5])
def test_an_adapter_adds_alpha_over_rank_times_b_a(alpha: float) -> None:
    network, adapters = linear(alpha)
    named = network.named_trainable()
    assert sorted(named) == ["0.lora_A.weight", "0.lora_B.weight"]
    a, b = named["0.lora_A.weight"], named["0.lora_B.weight"]
    nn.init.normal_(b)
    x = torch.randn(4, 5)
    with adapters.use(None):
        base = adapters.module(x)
    torch.testing.assert_close(network(x) - base, alpha / 2 * x @ a.T @ b.T)
    assert adapters.scalings("student") == {"0": alpha / 2}


def test_a_new_adapter_changes_nothing_and_draws_from_its_seed_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second = linear()[0].named_trainable(), linear()[0].named_trainable()
    torch.manual_seed(11)
    module = nn.Linear(5, 3)
    torch.manual_seed(11)
    adapters = Adapters(nn.Sequential(module))
    adapters.attach("student", LoraSpec(2, 2, ("0",)), seed=1)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)  # the global generator was left alone
    assert torch.equal(first["0.lora_A.weight"], second["0.lora_A.weight"])
    assert not torch.equal(first["0.lora_A.weight"], adapters.parameters("student")["0.lora_A.weight"])
    assert not adapters.parameters("student")["0.lora_B.weight"].any()


@pytest.mark.parametrize("targets", [ATTENTION, LCM_TARGETS])
def test_the_teacher_is_the_bare_base_before_and_after_training(base: Path, targets: tuple[str, ...]) -> None:
    model = opened(base)
    bare = run_unet(model.denoiser.module)
    assert torch.equal(look(model.denoiser), bare)
    student = student_of(model, 4, 64, targets)
    teacher = model.denoiser
    assert torch.equal(look(teacher), bare)
    before = look(student)
    assert not torch.allclose(before, bare, atol=1e-3)
    train(student)
    assert torch.equal(look(teacher), bare)
    assert not torch.allclose(look(student), before, atol=1e-4)
    assert len(student.adapters.scalings("student")) == MODULES[targets]
    assert len(student.trainable()) == 2 * MODULES[targets]
    assert teacher.trainable() == []


def test_student_and_teacher_are_one_copy_in_memory(base: Path) -> None:
    model = opened(base)
    size = parameter_bytes(model.denoiser.module)
    student = student_of(model)
    assert student.module is model.denoiser.module
    assert parameter_bytes(student.module) - size == sum(4 * p.numel() for p in student.trainable())


def test_use_puts_back_the_adapter_and_the_flags_also_after_an_exception(base: Path) -> None:
    model = opened(base)
    student = student_of(model)
    adapters = student.adapters
    adapters.duplicate("student")
    flags = {n: p.requires_grad for n, p in student.module.named_parameters()}
    assert sum(flags.values()) == len(student.trainable())
    at_rest = run_unet(student.module)
    for name in (None, "student", "student_frozen_1"):
        with pytest.raises(ZeroDivisionError), adapters.use(name), adapters.use(None):
            raise ZeroDivisionError
        assert adapters.current == "student"
        assert {n: p.requires_grad for n, p in student.module.named_parameters()} == flags
        assert torch.equal(run_unet(student.module), at_rest)
    with adapters.use(None):
        assert {n: p.requires_grad for n, p in student.module.named_parameters()} == flags
        with adapters.use("student"):
            assert torch.equal(run_unet(student.module), at_rest)
        assert adapters.current is None
    with pytest.raises(ValueError, match="expected one of the adapters"), adapters.use("nobody"):
        pass


def test_the_switch_says_to_peft_what_it_does() -> None:
    # it sets attributes of PEFT's layers directly; should PEFT rename them, this and the closed form fail
    network, adapters = linear()
    layer = network.module[0]
    adapters.duplicate("student")
    with adapters.use("student_frozen_1"):
        assert layer.active_adapters == ["student_frozen_1"]
        assert not layer.disable_adapters
    with adapters.use(None):
        assert layer.disable_adapters
    assert layer.active_adapters == ["student"]
    assert not layer.disable_adapters


def test_a_frozen_copy_is_a_second_adapter_that_later_training_leaves_alone(base: Path) -> None:
    model = opened(base)
    student = student_of(model, 4, 8)
    bare, before = look(model.denoiser), look(student)
    trained = student.trainable()
    twin = student.frozen_copy()
    assert twin.module is student.module
    assert twin.adapter != student.adapter
    assert twin.trainable() == []
    assert torch.equal(look(twin), before)
    assert all(p.requires_grad for p in student.trainable())
    train(student)
    assert torch.equal(look(twin), before)
    assert torch.equal(look(model.denoiser), bare)
    assert not torch.equal(look(student), before)
    assert [id(p) for p in student.trainable()] == [id(p) for p in trained]


def test_gradient_checkpointing_gives_the_same_gradients_with_the_teacher_called_in_between(base: Path) -> None:
    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        model = opened(base)
        student = student_of(model, 4, 16)
        student.frozen_copy()  # what computes at rest must still be the student
        student.module.train()
        if checkpointing:
            student.checkpoint_activations()
        calls = []
        block = student.module.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        output = student.output(*inputs())
        with torch.no_grad():
            target = model.denoiser.output(*inputs(1))
        (output - target).square().mean().backward()
        return [p.grad for p in student.trainable()], sum(calls)

    plain, forwards = gradients(False)
    again, recomputed = gradients(True)
    assert recomputed > forwards  # the activations really were computed again
    assert any(g.abs().max() > 0 for g in plain)
    for expected, found in zip(plain, again, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_on_a_half_precision_base_trains_in_float32(base: Path, dtype: torch.dtype) -> None:
    student = student_of(opened(base, dtype))
    assert {p.dtype for p in student.trainable()} == {torch.float32}
    assert {p.dtype for n, p in student.module.named_parameters() if "lora_" not in n} == {dtype}


def test_a_guest_computes_and_leaves_no_trace(base: Path) -> None:
    model = opened(base)
    student = student_of(model)
    module, adapters = student.module, student.adapters

    def load() -> None:
        module.add_adapter(LoraSpec(2, 2, ("to_q",)).peft_config(), "guest")
        for name, parameter in module.named_parameters():
            if ".guest." in name:
                nn.init.normal_(parameter)

    def state() -> tuple[object, ...]:
        layers = [m for m in module.modules() if "lora_A" in dict(m.named_children())]
        layer_state = [(m.active_adapters, m.disable_adapters, sorted(m.lora_A)) for m in layers]
        flags = [(n, p.requires_grad) for n, p in module.named_parameters()]
        return adapters.current, layer_state, flags, sorted(module.peft_config), module.training

    for resting in ("student", None):
        with adapters.use(resting):
            before, output = state(), run_unet(module)
            with adapters.guest("guest", load):
                assert not torch.equal(run_unet(module), output)
                assert len(adapters.scalings("guest")) == 8
            assert state() == before
            with pytest.raises(ZeroDivisionError), adapters.guest("guest", load):
                raise ZeroDivisionError
            with pytest.raises(ZeroDivisionError), adapters.guest("guest", lambda: 1 // 0):
                pass
            assert state() == before
            assert torch.equal(run_unet(module), output)


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"rank": 0}, "--student.rank"), ({"alpha": -1.0}, "--student.alpha"), ({"alpha": 0.0}, "--student.alpha")],
)
def test_sizes_that_make_no_adapter_are_refused(options: dict[str, float], flag: str) -> None:
    with pytest.raises(InputError, match=flag):
        StudentConfig(**options)


def test_targets_that_fit_no_module_are_named(base: Path) -> None:
    with pytest.raises(InputError, match="to_nowhere.*--student.targets"):
        student_of(opened(base), targets=("to_nowhere",))


def test_a_name_is_used_once(base: Path) -> None:
    model = opened(base)
    student_of(model)
    with pytest.raises(ValueError, match="attached already"):
        student_of(model)


def test_the_spec_falls_back_to_rank_and_the_family_s_targets() -> None:
    assert StudentConfig(rank=8).spec(["a", "b"]) == LoraSpec(8, 8.0, ("a", "b"))
    assert StudentConfig(rank=8, alpha=2, targets=CommaList.parse("c, d")).spec(["a"]) == LoraSpec(8, 2.0, ("c", "d"))
