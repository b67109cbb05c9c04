import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.randomness import StepRandom, derived_seed, generator, key


def draws(rng: StepRandom) -> tuple[Tensor, ...]:
    return rng.normal("noise", (4, 2)), rng.uniform("time"), rng.integers("choice", 0, 1000, (3,))


@pytest.mark.parametrize("splits", [[8], [1] * 8, [3, 5], [2, 2, 2, 2]], ids=str)
def test_any_split_of_the_global_batch_draws_the_same(splits: list[int]) -> None:
    whole = draws(StepRandom(5, 7, range(8)))
    parts, start = [], 0
    for size in splits:
        parts.append(draws(StepRandom(5, 7, range(start, start + size))))
        start += size
    for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(pieces))


def test_slices_and_any_order_of_positions() -> None:
    whole = StepRandom(5, 7, range(8))
    for full, part in zip(draws(whole), draws(whole.slice(2, 5)), strict=True):
        assert torch.equal(full[2:5], part)
    for full, part in zip(draws(whole), draws(StepRandom(5, 7, [6, 0])), strict=True):
        assert torch.equal(full[[6, 0]], part)
    assert len(whole.slice(2, 5)) == 3


def test_equal_streams_are_equal_and_all_else_differs() -> None:
    base = StepRandom(0, 0, [0, 1])
    noise = base.normal("noise", (16,))
    assert torch.equal(noise, base.normal("noise", (16,)))  # a stream holds no state
    assert torch.equal(noise, StepRandom(0, 0, [0, 1]).normal("noise", (16,)))
    others = [
        base.normal("other", (16,)),
        base.scoped("student").normal("noise", (16,)),
        base.scoped("critic").normal("noise", (16,)),
        StepRandom(1, 0, [0, 1]).normal("noise", (16,)),
        StepRandom(0, 1, [0, 1]).normal("noise", (16,)),
        StepRandom(0, 0, [2, 3]).normal("noise", (16,)),
    ]
    rows = torch.cat([noise, *others])  # every sample's own numbers, so positions 0 and 1 are compared as well
    assert len(rows.unique(dim=0)) == len(rows)


def test_scopes_nest_and_survive_slicing() -> None:
    inner = StepRandom(0, 0, range(4)).scoped("a").scoped("b")
    assert torch.equal(inner.slice(1, 3).normal("n"), inner.normal("n")[1:3])
    assert torch.equal(inner.to("cpu").normal("n"), inner.normal("n"))
    assert not torch.equal(inner.normal("n"), StepRandom(0, 0, range(4)).scoped("b").normal("n"))


def test_shared_is_one_number_for_all_positions() -> None:
    value = StepRandom(3, 4, [0]).shared("branch")
    assert value == StepRandom(3, 4, [5, 6, 7]).shared("branch")
    assert 0.0 <= value < 1.0
    assert value != StepRandom(3, 5, [0]).shared("branch")
    assert value != StepRandom(3, 4, [0]).shared("other")
    assert value != StepRandom(3, 4, [0]).scoped("phase").shared("branch")
    assert value != StepRandom(3, 4, [0]).uniform("branch").item()  # and is nobody's own draw


def test_moments_over_positions_and_over_elements() -> None:
    many = StepRandom(11, 2, range(4000))
    for values in (many.normal("noise").double(), StepRandom(11, 2, [0]).normal("noise", (4000,)).double()[0]):
        assert abs(values.mean()) < 0.06  # 4 standard errors
        assert abs(values.std() - 1) < 0.045
        assert abs((values**4).mean() - 3) < 0.65
    for values in (many.uniform("u"), StepRandom(11, 2, [0]).uniform("u", (4000,))[0]):
        assert abs(values.mean() - 0.5) < 0.019
        assert abs(values.var() - 1 / 12) < 0.005
        assert float(values.min()) >= 0.0
        assert float(values.max()) < 1.0
    assert many.integers("i", 2, 5).unique().tolist() == [2, 3, 4]
    assert abs(torch.corrcoef(torch.stack([many.uniform("u"), many.uniform("v")]))[0, 1]) < 0.065
    neighbours = many.normal("noise")
    assert abs(torch.corrcoef(torch.stack([neighbours[:-1], neighbours[1:]]))[0, 1]) < 0.065


def test_types_and_shapes() -> None:
    rng = StepRandom(0, 0, range(3))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert rng.normal("n", (2,), dtype).dtype == dtype
    assert rng.normal("n").shape == rng.uniform("n").shape == rng.integers("n", 0, 2).shape == (3,)
    assert rng.normal("n", (2, 4)).shape == (3, 2, 4)
    assert rng.uniform("n").dtype == torch.float64
    assert rng.integers("n", 0, 2).dtype == torch.int64


def test_global_generators_neither_matter_nor_move() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    first = draws(StepRandom(0, 0, range(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], legacy)  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    for a, b in zip(first, draws(StepRandom(0, 0, range(2))), strict=True):
        assert torch.equal(a, b)


def test_numpy_integers_are_integers() -> None:
    plain, numpy = StepRandom(1, 2, [3]), StepRandom(np.int64(1), np.int32(2), np.array([3]))  # type: ignore[arg-type]
    assert torch.equal(plain.normal("n"), numpy.normal("n"))


def test_keys_tell_types_and_borders_apart() -> None:
    keys = [key(1, 2), key(12), key("1", "2"), key("12"), key(1, "2"), key("1", 2), key(2, 1), key()]
    assert len(set(keys)) == len(keys)
    assert 0 <= derived_seed("x", 1) < 2**63


def test_pinned_values() -> None:
    """A change of the hash or of the generator would silently break the resume of every existing run.

    Strings hash differently in each process (PYTHONHASHSEED), so these literals hold that off the key as well.
    """
    assert key(0, 1, "noise", 2) == (14215657292441631985, 3196053952352042883)
    assert derived_seed(0, "data") == 4386511388638788876
    rng = StepRandom(0, 1, [2])
    assert_close(
        rng.normal("noise", (2,), torch.float64),
        torch.tensor([[-1.6996626844891383, 1.210004065952411]], dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )
    assert_close(
        rng.normal("noise", (2,)), torch.tensor([[-0.3451819121837616, 0.2337145358324051]]), rtol=0, atol=1e-7
    )
    assert rng.uniform("time").item() == 0.10852306436662029
    assert rng.integers("choice", 0, 1000).item() == 843
    assert rng.shared("branch") == 0.8405225311910737
    assert rng.scoped("student").uniform("time").item() == 0.7625893951536641
    assert generator(0, 1, "noise", 2).standard_normal() == -1.6996626844891383
