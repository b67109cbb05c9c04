"""What is done to pictures before a discriminator sees them: by hand, alike for all, and a function of the sample's place."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.networks.augmentation import KINDS, Augmentation, cut, moved, tinted
from stepdistill.randomness import StepRandom

EXACT = {"rtol": 0, "atol": 0}


def pictures(n: int = 4, height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    return torch.rand((n, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_colours_by_hand() -> None:
    x = pictures(2)
    u = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.25, 0.1]]).double()
    found = tinted(x, u)
    assert_close(found[0], x[0])  # + 0, * 1, * 1
    one = x[1] + 0.4
    grey = one.mean(0)
    one = grey + 0.5 * (one - grey)
    assert_close(found[1], one.mean() + 0.6 * (one - one.mean()))


@pytest.mark.parametrize(("u", "where"), [((0.0, 0.0), (2, 3)), ((0.5, 0.5), (0, 0)), ((0.999, 0.999), (-2, -3))])
def test_moves_by_hand(u: tuple[float, float], where: tuple[int, int]) -> None:
    """An eighth of 16 and 24 pixels either way; what comes in from outside is 0."""
    x = pictures(1)
    found, (down, right) = moved(x, torch.tensor([u]).double()), where
    wanted = torch.zeros_like(x)
    wanted[..., max(down, 0) : 16 + min(down, 0), max(right, 0) : 24 + min(right, 0)] = x[
        ..., max(-down, 0) : 16 - max(down, 0), max(-right, 0) : 24 - max(right, 0)
    ]
    assert_close(found, wanted, **EXACT)


def test_moves_are_each_as_likely() -> None:
    n = 5000
    x = torch.zeros(n, 1, 16, 16)
    x[:, :, 8, 8] = 1.0
    found = moved(x, StepRandom(0, 0, range(n)).uniform("u", (2,))).sum((0, 1)) / n
    inside = found[6:11, 6:11]
    assert float(inside.sum()) == pytest.approx(1.0) and float((inside - 1 / 25).abs().max()) < 5 * (0.04 / n) ** 0.5


@pytest.mark.parametrize(
    ("u", "rows", "columns"),
    [((0.0, 0.0), (0, 4), (0, 6)), ((0.5, 0.5), (4, 12), (6, 18)), ((0.9999, 0.9999), (12, 16), (18, 24))],
)
def test_cuts_by_hand(u: tuple[float, float], rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Half of each side, around a centre anywhere from edge to edge."""
    x = pictures(1)
    wanted = x.clone()
    wanted[..., rows[0] : rows[1], columns[0] : columns[1]] = 0.0
    assert_close(cut(x, torch.tensor([u]).double()), wanted, **EXACT)


def test_gradients_come_back_from_where_the_pixels_went() -> None:
    x = pictures(1).requires_grad_(True)
    weights = pictures(1, seed=3)
    (gradient,) = torch.autograd.grad((moved(x, torch.tensor([[0.0, 0.999]]).double()) * weights).sum(), x)
    assert_close(gradient, moved(weights, torch.tensor([[0.999, 0.0]]).double()), **EXACT)
    whole = Augmentation(KINDS, StepRandom(0, 0, range(4)))
    x = pictures().double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda pixels: whole(pixels)[:, :, ::5, ::5], x[:, :, :8, :8], fast_mode=True)


def test_real_and_made_pictures_get_the_same() -> None:
    """Linear up to the level of brightness: the difference of two pictures tells what was done."""
    done = Augmentation(("translation", "cutout"), StepRandom(0, 3, range(4)))
    one, other = pictures(), pictures(seed=1)
    assert_close(done(one) - done(other), done(one - other), rtol=0, atol=1e-6)
    assert_close(done(one), done(one), **EXACT)


def test_a_sample_is_treated_by_its_place_in_the_global_batch_and_by_the_step() -> None:
    x, rng = pictures(6), StepRandom(0, 3, range(6))
    whole = Augmentation(KINDS, rng)(x)
    parts = [Augmentation(KINDS, rng.slice(i, i + 2))(x[i : i + 2]) for i in (0, 2, 4)]
    assert_close(torch.cat(parts), whole)
    for other in (StepRandom(1, 3, range(6)), StepRandom(0, 4, range(6)), StepRandom(0, 3, range(6, 12))):
        assert not torch.allclose(Augmentation(KINDS, other)(x), whole)
    for i, j in ((0, 1), (2, 5)):
        same = x[:1].expand(6, -1, -1, -1)
        found = Augmentation(KINDS, rng)(same)
        assert not torch.allclose(found[i], found[j])


def test_what_is_cut_or_moved_in_is_zero_whatever_the_tint() -> None:
    x = torch.ones(8, 3, 16, 16)
    found = Augmentation(KINDS, StepRandom(0, 0, range(8)))(x)
    assert float((found == 0).float().mean()) > 0.1
    assert_close(Augmentation(KINDS[::-1], StepRandom(0, 0, range(8)))(x), found, **EXACT)


def test_none_and_unknown_ones() -> None:
    x = pictures()
    assert Augmentation((), StepRandom(0, 0, range(4)))(x) is x
    with pytest.raises(InputError, match=r"colour, translation, cutout, got 'color'; fix --method\.augmentations"):
        Augmentation(("color",), StepRandom(0, 0, range(4)))
    grey = Augmentation(KINDS, StepRandom(0, 0, range(4)))(x[:, :1])
    assert grey.shape == (4, 1, 16, 24)
