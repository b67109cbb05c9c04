"""8-bit moments: bitsandbytes' own where it is installed, else a stand-in with its interface; in the loop and in files."""

import copy
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from toys import EXACT, Killed, Numbers, Regression, network, options, rows, saved, stopping_after, train

from stepdistill.errors import InputError
from stepdistill.networks.network import Module
from stepdistill.training.optimization import make_optimizer

NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes' state_dict puts what is packed


class StandIn(torch.optim.Optimizer):
    """Steps of the sign of a mean gradient in 8 bits; its state has the types and the nesting of bitsandbytes'."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), weight_decay: float = 1e-2, eps: float = 1e-8
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                packed = self.state[parameter].setdefault("state1", torch.zeros_like(parameter, dtype=torch.uint8))
                gradient = (parameter.grad / parameter.grad.abs().max().clamp(min=1e-20) * 100 + 100).to(torch.uint8)
                packed.copy_(packed // 2 + gradient // 2)
                self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
                parameter.sub_((packed.float() - 100).sign() * group["lr"])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["state"] = {i: {"step": v["step"], NESTED: {"state1": v["state1"]}} for i, v in state["state"].items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        moments = {p: state["state"][i] for i, p in enumerate(self.param_groups[0]["params"]) if i in state["state"]}
        for parameter, of in moments.items():
            self.state[parameter] = {"step": of["step"], **of[NESTED]}


class NoKernels(StandIn):
    def step(self, closure: None = None) -> None:
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update_8bit_blockwise'")


def install(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    package, inner = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    inner.AdamW8bit = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", inner)


@pytest.fixture(params=["bitsandbytes", "stand-in"])
def adam(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Only the stand-in where the package is missing."""
    if request.param == "stand-in":
        install(monkeypatch, StandIn)
        return StandIn
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def wide() -> Regression:
    """Two of its parameters have 4096 numbers, from which on moments are kept in 8 bits."""
    method = Regression()
    method.student = network(0, width=512)
    return method


def test_moments_in_8_bits_come_back_bit_by_bit(tmp_path: Path, adam: type) -> None:
    changes = {"data": Numbers(width=512), "use_8bit_adam": True, "max_train_steps": 5, "checkpointing_steps": 2}
    train(tmp_path / "whole", wide(), **changes)
    method = wide()
    with stopping_after(method, 4, Killed.now), pytest.raises(Killed):
        train(tmp_path / "killed", method, **changes)
    train(tmp_path / "killed", wide(), resume_from_checkpoint="latest", **changes)
    tensors, wanted = saved(tmp_path / "killed")[0], saved(tmp_path / "whole")[0]
    assert wanted[f"student.optimizer/state.0.{NESTED}.state1"].dtype == torch.uint8
    assert_close(tensors, wanted, **EXACT)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    losses = [row["loss"] for row in rows(tmp_path / "whole")]
    assert losses[-1] < losses[0]


def test_it_gets_the_options_of_adam(adam: type) -> None:
    config = options(use_8bit_adam=True, adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.3, adam_epsilon=1e-5)
    optimizer = make_optimizer(config, wide().student)
    assert type(optimizer) is adam
    group = optimizer.param_groups[0]
    assert (group["lr"], *group["betas"], group["weight_decay"], group["eps"]) == (1e-2, 0.8, 0.9, 0.3, 1e-5)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'stepdistill\[bitsandbytes\]', or drop --train.use_8bit_adam"):
        make_optimizer(options(use_8bit_adam=True), Module(nn.Linear(2, 2)))


def test_a_device_without_kernels_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, NoKernels)
    with pytest.raises(InputError, match=r"8-bit kernels for, got cpu: .*; drop --train.use_8bit_adam"):
        make_optimizer(options(use_8bit_adam=True), Module(nn.Linear(2, 2)))


def test_8_bits_are_not_shared_out() -> None:
    with pytest.raises(InputError, match=r"--train.parallel fsdp.*drop --train.use_8bit_adam"):
        options(use_8bit_adam=True, parallel="fsdp")
