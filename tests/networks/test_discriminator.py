"""Heads: what a logit depends on, and on what it must not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.networks.discriminator import Discriminator, SpectralConv2d

EXACT = {"rtol": 0, "atol": 0}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest(conv: SpectralConv2d) -> float:
    return float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1).double(), 2))


def divided_by(conv: SpectralConv2d) -> float:
    """What the layer divides its weight by, from what it computes without its bias."""
    side = conv.kernel_size[0]
    x = draws(1, conv.in_channels, side, side)
    plain = nn.functional.conv2d(x, conv.weight, padding=side // 2)
    with torch.no_grad():
        found = conv(x) - conv.bias[None, :, None, None]
    return float((plain.detach() / found).median())


def seeded(*arguments: Any) -> SpectralConv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SpectralConv2d(*arguments)


@pytest.mark.parametrize("shape", [(5, 7, 1), (4, 3, 3), (1, 6, 1)])
def test_a_weight_is_divided_by_its_largest_singular_value(shape: tuple[int, int, int]) -> None:
    conv = seeded(*shape)
    conv.advance(200)
    assert_close(divided_by(conv), largest(conv), rtol=1e-4, atol=0)


def test_the_power_iteration_advances_when_it_is_told_to_and_once() -> None:
    conv = seeded(5, 7, 1)
    before = conv.u.clone()
    for _ in range(3):
        conv(draws(2, 5, 4, 4)).sum().backward()
    assert torch.equal(conv.u, before), "a forward moves nothing: micro-batches must meet one function"
    with torch.no_grad():
        conv.weight.copy_(draws(7, 5, 1, 1, seed=3))
    matrix = conv.weight.detach().flatten(1)
    v = nn.functional.normalize(matrix.T @ before, dim=0)
    conv.advance()
    assert_close(conv.v, v)
    assert_close(conv.u, nn.functional.normalize(matrix @ v, dim=0))


def test_the_gradient_knows_that_the_norm_moves_with_the_weight() -> None:
    """W / |W| does not change with the scale of W: the gradient is orthogonal to W."""
    conv = seeded(5, 7, 1)
    conv.advance(200)
    conv(draws(3, 5, 2, 2)).square().sum().backward()
    assert conv.weight.grad is not None
    weight, gradient = conv.weight.detach(), conv.weight.grad
    assert abs(float((gradient * weight).sum())) < 1e-5 * float(gradient.norm() * weight.norm())


def heads(seed: int = 0, width: int = 8) -> Discriminator:
    return Discriminator([3, 5], conditions=4, width=width, seed=seed)


def features(batch: int, seed: int = 0) -> list[Tensor]:
    return [draws(batch, 3, 4, 6, seed=seed), draws(batch, 5, 2, 3, seed=seed + 1)]


def test_logits_have_one_entry_a_place_of_each_feature() -> None:
    logits = heads()(features(2), draws(2, 4))
    assert [tuple(part.shape) for part in logits] == [(2, 24), (2, 6)]


@pytest.mark.parametrize("batch", [1, 9, 17])
def test_a_samples_logits_do_not_depend_on_the_others(batch: int) -> None:
    net, given, condition = heads(), features(batch), draws(batch, 4)
    whole = net(given, condition)
    for i in range(batch):
        alone = net([feature[i : i + 1] for feature in given], condition[i : i + 1])
        for part, one in zip(whole, alone, strict=True):
            assert_close(part[i : i + 1], one)


def test_a_logit_sees_its_neighbours_and_no_further() -> None:
    """No norm over the places: the middle's brightness is not taken from the corner."""
    net = Discriminator([3], 4, 8)
    one = draws(1, 3, 7, 7)
    other = one.clone()
    other[0, :, 0, 0] += 5.0
    with torch.no_grad():
        moved = (net([one], draws(1, 4))[0] - net([other], draws(1, 4))[0]).abs().reshape(7, 7) > 0
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_the_condition_matters_to_every_head() -> None:
    net = heads()
    one, other = net(features(2), draws(2, 4)), net(features(2), draws(2, 4, seed=9))
    assert all(float((a - b).detach().abs().max()) > 1e-3 for a, b in zip(one, other, strict=True))


def test_first_weights_come_from_the_seed_and_not_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    one = heads(seed=3).state()
    torch.manual_seed(99)
    assert_close(heads(seed=3).state(), one, **EXACT)
    assert not torch.equal(heads(seed=4).state()["embed.0.weight"], one["embed.0.weight"])
    torch.set_rng_state(state)
    heads()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_spectral_vectors_are_saved() -> None:
    net = heads()
    with torch.no_grad():
        for parameter in net.trainable():
            parameter.mul_(1.0 + 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in net.state().items()}
    net.advance()
    moved = {name for name, value in net.state().items() if not torch.equal(value, before[name])}
    layers = ("point", "around", "last")
    assert moved >= {f"heads.{i}.{layer}.u" for i in (0, 1) for layer in layers}
    assert all(name.endswith((".u", ".v")) for name in moved)


def test_heads_compute_in_float32_under_autocast_and_on_half_precision_features() -> None:
    net, condition = heads(), draws(2, 4)
    given = [feature.bfloat16() for feature in features(2)]
    plain = net([feature.float() for feature in given], condition)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(given, condition.bfloat16().float())
    again = net(given, condition.bfloat16().float())
    assert all(part.dtype == torch.float32 for part in found)
    assert_close(found, again, **EXACT)
    assert_close([part.detach() for part in plain], [part.detach() for part in found], rtol=0.1, atol=0.1)
