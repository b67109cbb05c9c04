import pytest
import torch
from torch.testing import assert_close

from stepdistill.batch import Batch, concat, move
from stepdistill.randomness import StepRandom


def batch(x0: torch.Tensor | None) -> Batch:
    cond = {"text": torch.ones(2, 3), "label": torch.tensor([1, 2])}
    return Batch(x0, cond, {"text": torch.zeros(2, 3), "label": torch.tensor([-1, -1])}, StepRandom(0, 0, [4, 5]))


def test_length_comes_from_the_randomness_so_data_free_batches_have_one() -> None:
    assert len(batch(None)) == 2
    assert len(batch(torch.ones(2, 1))) == 2


def test_data_or_a_clear_error() -> None:
    x0 = torch.ones(2, 1)
    assert batch(x0).data() is x0
    with pytest.raises(ValueError, match="needs data"):
        batch(None).data()


def test_moving_keeps_everything() -> None:
    there = torch.device("meta")  # a device that every machine has
    source = batch(torch.ones(2, 1))
    source.extra["tokens"] = torch.ones(2, 7)
    source.memo["fake"] = 1
    moved = source.to(there)
    assert moved.x0 is not None
    for tensor in (moved.x0, *moved.cond.values(), *moved.uncond.values(), *moved.extra.values()):
        assert tensor.device.type == "meta"
    assert moved.rng.normal("noise").device.type == "meta"
    assert moved.rng.uniform("time").device.type == "cpu"  # times stay on the CPU
    assert moved.rng.positions == (4, 5)
    assert moved.memo is source.memo  # shared by the phases of a step
    assert batch(None).to(there).x0 is None
    assert move({}, there) == {}


def test_extras_are_not_shared_between_batches() -> None:
    first, second = batch(None), batch(None)
    first.memo["fake"] = first.extra["x"] = torch.ones(1)
    assert second.memo == {}
    assert second.extra == {}


def test_concat() -> None:
    source = batch(None)
    both = concat(source.cond, source.uncond)
    assert both["label"].tolist() == [1, 2, -1, -1]
    assert_close(both["text"], torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match="same condition keys"):
        concat(source.cond, {"text": torch.zeros(2, 3)})
