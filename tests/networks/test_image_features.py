"""Pictures for a vision network: resized as Pillow does, normalised, and read as maps."""

from typing import Any

import numpy as np
import pytest
import torch
from eyes import Sight, sight
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.networks.image_features import ImageFeatures, blocks, evenly, resizer

EXACT = {"rtol": 0, "atol": 0}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("sides", [(48, 20, 32, 32), (16, 16, 32, 24)])
def test_a_resize_is_pillows_and_torchs(sides: tuple[int, int, int, int], bilinear: bool) -> None:
    height, width, h, w = sides
    eye = ImageFeatures(Sight(), ["blocks.0"], (h, w), (0.0,) * 3, (0.5,) * 3, bilinear=bilinear)
    x = draws(2, 3, height, width)
    found = eye.prepared(x) - 1.0  # ((x + 1) / 2 - 0) / 0.5 = x + 1
    mode = "bilinear" if bilinear else "bicubic"
    assert_close(found, functional.interpolate(x, (h, w), mode=mode, antialias=True), rtol=1e-4, atol=1e-5)
    filters = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    pillow = Image.fromarray(x[1, 2].numpy()).resize((w, h), filters)
    assert_close(found[1, 2], torch.from_numpy(np.array(pillow)), rtol=1e-4, atol=1e-4)


def test_a_resize_keeps_flat_pictures_flat_and_its_gradient_is_the_transpose() -> None:
    matrix = resizer(48, 32)
    assert matrix.shape == (32, 48)
    assert_close(matrix.sum(1), torch.ones(32))
    x = draws(1, 3, 48, 48).requires_grad_(True)
    eye = ImageFeatures(Sight(), ["blocks.0"], (32, 32), (0.0,) * 3, (0.5,) * 3)
    weights = draws(1, 3, 32, 32, seed=1)
    (gradient,) = torch.autograd.grad((eye.prepared(x) * weights).sum(), x)
    assert_close(gradient, matrix.T @ weights @ matrix)


def test_pixels_are_normalised_with_the_checkpoints_mean_and_std() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    eye = ImageFeatures(Sight(), ["blocks.0"], (8, 8), mean, std)
    x = draws(2, 3, 8, 8)
    wanted = torch.stack([((x[:, i] + 1) / 2 - mean[i]) / std[i] for i in range(3)], 1)
    assert_close(eye.prepared(x), wanted)
    grey = draws(2, 1, 8, 8)
    assert_close(eye.prepared(grey), eye.prepared(grey.repeat(1, 3, 1, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        larger = draws(1, 3, 16, 16)
        found = eye.prepared(larger)
    assert_close(found, eye.prepared(larger), **EXACT)


class Tokens(nn.Module):
    """One block that returns what it is told."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.blocks, self.shape = nn.ModuleList([nn.Identity()]), shape

    def forward(self, pixel_values: Tensor) -> dict[str, Any]:
        out = self.blocks[0](torch.arange(float(torch.tensor(self.shape).prod())).reshape(self.shape))
        return {"last_hidden_state": out}


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tokens_become_maps_without_those_before_the_patches(prefix: int) -> None:
    net = Tokens(1, prefix + 6, 2)
    eye = ImageFeatures(net, ["blocks.0"], (16, 24), patch=8, prefix=3)
    (found,) = eye(draws(1, 3, 16, 24))
    tokens = torch.arange(2.0 * (prefix + 6)).reshape(prefix + 6, 2)[prefix:]
    assert found.shape == (1, 2, 2, 3)
    for row in range(2):
        for column in range(3):
            assert_close(found[0, :, row, column], tokens[3 * row + column], **EXACT)


@pytest.mark.parametrize("shape", [(1, 10, 2), (1, 5, 2), (1, 2), (1, 2, 2, 3, 1)])
def test_features_without_places_are_refused(shape: tuple[int, ...]) -> None:
    eye = ImageFeatures(Tokens(*shape), ["blocks.0"], (16, 24), patch=8, prefix=3)
    with pytest.raises(InputError, match=r"2x3 tokens and up to 3 before them, at 'blocks\.0'.*--method\.taps"):
        eye(draws(1, 3, 16, 24))


def test_mistakes_at_construction() -> None:
    with pytest.raises(InputError, match=r"multiple of 14 pixels.*got 220x220; fix --eye\.size \(224"):
        ImageFeatures(Sight(), ["blocks.0"], (220, 220), patch=14)
    with pytest.raises(InputError, match=r"multiple of 14.*got 224x230"):
        ImageFeatures(Sight(), ["blocks.0"], (224, 230), patch=14)
    with pytest.raises(InputError, match=r"got 0x0"):
        ImageFeatures(Sight(), ["blocks.0"], (0, 0), patch=14)
    with pytest.raises(InputError, match=r"'blocks\.7'; fix --method\.taps \(its blocks are blocks\.0, blocks\.1"):
        ImageFeatures(Sight(), ["blocks.0", "blocks.7"], (8, 8))
    with pytest.raises(InputError, match=r"one tap or more"):
        ImageFeatures(Sight(), [], (8, 8))

    class Idle(Sight):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Identity()

    with pytest.raises(InputError, match=r"'idle', which it calls nothing of"):
        ImageFeatures(Idle(), ["idle"], (8, 8))(draws(1, 3, 8, 8))


def test_gradients_reach_the_pixels_and_the_weights_stay(caplog: pytest.LogCaptureFixture) -> None:
    eye, x = sight(), draws(2, 3, 12, 12).requires_grad_(True)
    before = {name: value.clone() for name, value in eye.net.module.state_dict().items()}
    maps = eye(x)
    assert [tuple(m.shape) for m in maps] == [(2, 6, 8, 8)] * 2
    sum(m.square().sum() for m in maps).backward()
    assert x.grad is not None and float(x.grad.abs().min()) > 0
    assert all(p.grad is None and not p.requires_grad for p in eye.net.module.parameters())
    assert not eye.net.module.training
    assert_close(dict(eye.net.module.state_dict()), before, **EXACT)
    assert eye.net.trainable() == []


def test_pooled_is_the_mean_of_tokens_where_there_is_nothing_else() -> None:
    eye, x = sight(), draws(2, 3, 8, 8)
    assert_close(eye.pooled(x), eye.net(pixel_values=eye.prepared(x))["last_hidden_state"].mean(1))


def test_the_blocks_are_the_longest_list_and_four_are_taken_evenly() -> None:
    net = nn.ModuleDict({"few": nn.ModuleList([nn.Identity()] * 2), "many": nn.ModuleList([nn.Identity()] * 12)})
    assert blocks(net) == [f"many.{i}" for i in range(12)]
    assert evenly(blocks(net)) == ["many.2", "many.5", "many.8", "many.11"]
    assert blocks(nn.Linear(1, 1)) == [] and evenly([]) == []
    assert [evenly([str(i) for i in range(n)]) for n in (1, 2, 4, 6)] == [
        ["0"], ["0", "1"], ["0", "1", "2", "3"], ["0", "2", "3", "5"]
    ]  # fmt: skip
    assert blocks(nn.ModuleList([nn.Identity()])) == ["0"]
