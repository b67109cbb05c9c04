from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from stepdistill.training.checkpoint import CheckpointStore
from stepdistill.training.state import join_state, split_state

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def assert_same(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert_close(a, b, equal_nan=True, **EXACT)
    elif isinstance(a, dict):
        assert [(type(k), k) for k in a] == [(type(k), k) for k in b]
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


NESTED = {
    "none": None,
    "flags": [True, False, 1, 1.0, 0, -0.0, 1e-300, 0.1 + 0.2, 2**70, "text", ""],
    "odd": [float("nan"), float("inf"), -float("inf")],
    "tuple": (1, (2, [3, (4,)]), ()),
    "deep": [[torch.zeros(2, dtype=torch.float64)], {"x": [torch.tensor(3, dtype=torch.int64)]}],
    0: {
        "0": torch.tensor(1.0),
        0: torch.tensor(2.0),
        None: torch.tensor(True),
        1.5: "float key",
        (1, "a"): "tuple key",
    },
    "a.b": torch.tensor(1),
    "a": {"b": torch.tensor(2), "b'": torch.tensor(3)},
    "": torch.tensor(4),
    "__metadata__": torch.tensor(5),
    "$tensor": "not a tag",
    "tags": {"$tensor": torch.tensor(6)},
    "empty": [{}, [], torch.empty(0, 3)],
    "bf16": torch.randn(3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
}


def through_disk(store: CheckpointStore, state: dict) -> dict:
    tensors, scalars = split_state(state)
    store.save(1, {"state_of": tensors}, {"method": scalars})
    found = store.find(strict=True)
    return join_state(found.tensors("state_of"), found.state["method"])


def test_nested_states_round_trip(store):
    assert_same(through_disk(store, NESTED), NESTED)
    assert_same(through_disk(store, {}), {})


def test_a_plain_state_stays_readable():
    tensors, scalars = split_state({"steps": 8, "scale": torch.tensor(1.0), "rungs": [8, 4]})
    assert scalars == {"steps": 8, "scale": {"$tensor": "scale"}, "rungs": [8, 4]} and list(tensors) == ["scale"]


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", torch.float32])
def test_other_values_are_refused_with_their_place(value):
    with pytest.raises(ValueError, match=r"a\.0"):
        split_state({"a": [value]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adamw_state_continues_to_the_same_bits(store, dtype):
    def made():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)
        first, second = [[p for p in layer.parameters()] for layer in (net[0], net[2])]
        groups = [{"params": first, "lr": 1e-2}, {"params": second, "weight_decay": 0.1}]
        return net, torch.optim.AdamW(groups, lr=1e-3, amsgrad=True)

    def steps(net, optimizer, count):
        for i in range(count):
            optimizer.zero_grad()
            net(torch.full((5, 3), 0.1 * (i + 1), dtype=dtype)).square().sum().backward()
            optimizer.step()

    net, optimizer = made()
    steps(net, optimizer, 3)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    saved = through_disk(store, optimizer.state_dict())
    assert_same(saved, optimizer.state_dict())
    steps(net, optimizer, 3)
    other, resumed = made()
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    steps(other, resumed, 3)
    assert_close(dict(other.state_dict()), dict(net.state_dict()), **EXACT)
