import pytest
import torch

from stepdistill.data.order import indices, order


def test_an_epoch_is_a_permutation_and_depends_on_seed_and_epoch():
    first = order(0, 0, 100)
    assert first.dtype == torch.int64
    assert sorted(first.tolist()) == list(range(100))
    assert first.tolist() != list(range(100))
    assert not torch.equal(first, order(0, 1, 100))
    assert not torch.equal(first, order(1, 0, 100))
    assert torch.equal(first, order(0, 0, 100))


def test_the_callers_copy_can_be_changed():
    order(0, 0, 10).zero_()
    assert sorted(order(0, 0, 10).tolist()) == list(range(10))


@pytest.mark.parametrize(("length", "global_batch"), [(12, 4), (12, 5), (7, 3), (3, 8), (1, 4), (5, 1)])
def test_every_epoch_sees_each_sample_once_and_batches_cross_its_end(length: int, global_batch: int):
    steps = -(-4 * length // global_batch)
    line = [i for step in range(steps) for i in indices(3, step, range(global_batch), global_batch, length)]
    for epoch in range(4):
        assert line[epoch * length : (epoch + 1) * length] == order(3, epoch, length).tolist()


def test_a_batch_may_be_split_in_any_way():
    whole = indices(5, 7, range(8), 8, 11)
    assert [i for p in range(8) for i in indices(5, 7, [p], 8, 11)] == whole
    assert indices(5, 7, [6, 1, 3], 8, 11) == [whole[6], whole[1], whole[3]]
    # the step in samples is what counts: 2 steps of 4 are 1 step of 8
    assert indices(5, 14, range(4), 4, 11) + indices(5, 15, range(4), 4, 11) == whole


@pytest.mark.parametrize(("step", "positions", "length"), [(-1, [0], 5), (0, [4], 5), (0, [-1], 5), (0, [0], 0)])
def test_nonsense_is_refused(step: int, positions: list[int], length: int):
    with pytest.raises(ValueError, match="expected"):
        indices(0, step, positions, 4, length)
