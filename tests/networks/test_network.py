"""What a role trains, what a copy shares, and what a tap sees."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from stepdistill.networks.network import Module, Network, parameter_bytes


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def one_process() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    distributed.destroy_process_group()


def test_what_trains_is_fixed_at_construction() -> None:
    net = small()
    net[0].requires_grad_(False)
    network = Network(net)
    assert sorted(network.named_trainable()) == ["2.bias", "2.weight"]
    net.requires_grad_(False)
    assert len(network.trainable()) == 2
    assert network.trainable() == network.trainable()  # a list, not an iterator that the first reader uses up


def test_a_wrapped_network_shows_its_module(one_process: None) -> None:
    network = Module(small())
    net, names = network.net, sorted(network.named_trainable())
    network.net = DistributedDataParallel(net)
    assert network.module is net
    assert sorted(network.named_trainable()) == names
    x = torch.randn(2, 3)
    torch.testing.assert_close(network(x), net(x))
    with network.taps(["0"]) as features:
        network(x)
    torch.testing.assert_close(features["0"], net[0](x))


def test_a_frozen_copy_keeps_its_weights_and_never_trains() -> None:
    network = Module(small())
    network.module.train()
    twin = network.frozen_copy()
    x = torch.randn(2, 3)
    before = network(x).detach()
    with torch.no_grad():
        for parameter in network.trainable():
            parameter.add_(1.0)
    torch.testing.assert_close(twin(x), before, rtol=0, atol=0)
    assert not torch.allclose(network(x), before)
    assert twin.trainable() == []
    assert not any(p.requires_grad for p in twin.module.parameters())
    assert not twin.module.training
    assert network.module.training
    assert len(network.trainable()) == 4


def test_taps_see_the_features_with_their_graph() -> None:
    network = Module(small())
    x = torch.randn(2, 3)
    with network.taps(["0", "2"]) as features:
        output = network(x)
    torch.testing.assert_close(features["0"], network.module[0](x))
    assert features["2"] is output
    features["0"].sum().backward()
    assert network.module[0].weight.grad is not None


def test_taps_take_the_tensor_of_a_tuple() -> None:
    network = Module(nn.Sequential(nn.GRU(3, 4, batch_first=True)))
    with network.taps(["0"]) as features:
        network(torch.randn(2, 5, 3))
    assert features["0"].shape == (2, 5, 4)


def test_taps_are_gone_after_an_exception() -> None:
    network = Module(small())
    with pytest.raises(ZeroDivisionError), network.taps(["0"]):
        raise ZeroDivisionError
    assert not network.module[0]._forward_hooks
    with pytest.raises(ValueError, match=r"\['nowhere'\]"), network.taps(["0", "nowhere"]):
        pass
    assert not network.module[0]._forward_hooks


def test_parameter_bytes_counts_each_storage_once() -> None:
    net = small()
    net[0].weight.data = net[0].weight.data.half()
    assert parameter_bytes(net) == 12 * 2 + 4 * 4 + 8 * 4 + 2 * 4
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert parameter_bytes(tied) == 9 * 4
