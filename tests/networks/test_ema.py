"""The average in closed form, and that applying it is undone."""

from pathlib import Path

import pytest
import torch
from students import look, opened, randomised, student_of, train
from torch import nn

from stepdistill.networks.ema import EMA
from stepdistill.networks.network import Module


def scalar(value: float = 1.0, dtype: torch.dtype = torch.float32) -> Module:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data = torch.full((1, 1), value, dtype=dtype)
    return Module(net)


def set_to(network: Module, value: float) -> None:
    network.module.weight.data.fill_(value)


def test_early_updates_count_and_later_ones_decay() -> None:
    network = scalar(1.0)
    ema = EMA(network, 0.2)
    expected = 1.0
    for n, value in enumerate([3.0, -1.0, 5.0, 2.0]):
        set_to(network, value)
        ema.update()
        decay = [0.1, 2 / 11, 0.2, 0.2][n]  # (1 + n) / (10 + n) up to the decay asked for
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.shadow["weight"], torch.full((1, 1), expected))
    assert ema.updates == 4


def test_the_average_is_held_in_float32_where_the_weights_are_not() -> None:
    network = scalar(1.0, torch.bfloat16)
    ema = EMA(network, 0.999)
    ema.updates = 10**6
    set_to(network, 2.0)
    for _ in range(10):
        ema.update()  # steps of 0.001, which bfloat16 can't add to 1
    assert ema.shadow["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.shadow["weight"], torch.full((1, 1), 2 - 0.999**10), rtol=1e-5, atol=0)


def test_applied_gives_the_average_and_takes_it_back_also_after_an_exception() -> None:
    network = scalar(1.0)
    ema = EMA(network, 0.5)
    set_to(network, 3.0)
    ema.update()  # 0.1 * 1 + 0.9 * 3
    parameter = network.module.weight
    with ema.applied():
        torch.testing.assert_close(network(torch.ones(1, 1)), torch.full((1, 1), 2.8))
    assert parameter.item() == 3.0
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert network.module.weight is parameter
    assert parameter.item() == 3.0
    torch.testing.assert_close(ema.shadow["weight"], torch.full((1, 1), 2.8))


def test_of_a_lora_student_the_adapter_alone_is_averaged(base: Path) -> None:
    model = opened(base)
    student = student_of(model)
    ema = EMA(student, 0.9)
    assert ema.shadow.keys() == student.named_trainable().keys()
    at_start, bare = look(student), look(model.denoiser)
    train(student)
    trained = look(student)
    with ema.applied():
        assert torch.equal(look(student), at_start)
        assert torch.equal(look(model.denoiser), bare)
    assert torch.equal(look(student), trained)
    assert all(p.requires_grad for p in student.trainable())
    before = {n: v.clone() for n, v in ema.shadow.items()}
    randomised(student, seed=5)
    assert all(torch.equal(ema.shadow[n], v) for n, v in before.items())  # a copy, not the weights themselves


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_that_never_moves_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="EMA decay"):
        EMA(scalar(), decay)
