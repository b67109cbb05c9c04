"""What can't be shared out is refused with the reason and the fix, and what is gathered together."""

from collections.abc import Callable
from pathlib import Path

import pytest
from parallel_process import Blocks, Follow
from torch import nn
from torch.testing import assert_close
from toys import EXACT, Duel, Numbers, options, rows, saved, train

from stepdistill.errors import InputError
from stepdistill.method import Method
from stepdistill.networks.lora import Adapters
from stepdistill.networks.network import Module
from stepdistill.training import parallel
from stepdistill.training.parallel import refuse_other_wrappers
from stepdistill.training.trainer import Trainer


def adapter_method() -> Method:
    """A student on a base that has adapters."""
    method = Follow()
    method.student.adapters = Adapters(method.student.module)
    return method


class Writes(Follow):
    """It generates in a step."""

    @property
    def needs_whole(self) -> str:
        return "to write text with"


def entangled() -> Method:
    """The target is the student's own last layer."""
    method = Follow()
    method.target = Module(method.student.module.last)
    return method


def tied() -> Method:
    """Two blocks share a layer."""
    method = Follow()
    layers = method.student.module
    layers.blocks[2].inner = layers.blocks[0].inner
    return method


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (adapter_method, "full student .*, got a LoRA adapter in 'student', .*teacher's.*; .*--student.kind full"),
        (Duel, "one trained network .*, got critic, student: .*; use --train.parallel ddp"),
        (Writes, "whole weights to write text with, got shards of them; use --train.parallel ddp"),
        (tied, "blocks with weights of their own .*, got blocks.2.inner.weight of 'student' in several; use .* ddp"),
        (entangled, "networks of their own .*, got weights that 'student' and 'target' share; use .* ddp"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Method], reason: str
) -> None:
    monkeypatch.setattr(parallel, "UNIT", 20)
    trainer = Trainer(options(parallel="fsdp"), tmp_path)
    for ask in (trainer.check, lambda method: trainer.fit(method, Numbers())):
        with pytest.raises(InputError, match=f"expected .*{reason}"):
            ask(make())
    Trainer(options(parallel="ddp"), tmp_path).check(make())
    assert not any((tmp_path / part).exists() for part in ("metrics.jsonl", "checkpoints", "config.yaml"))


@pytest.mark.parametrize(
    ("key", "name"),
    [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron"), ("PARALLELISM_CONFIG", "mesh")],
)
def test_accelerates_own_wrappers_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "True")
    with pytest.raises(InputError, match=rf"got .*{name}.*launch without it.*--train.parallel fsdp"):
        Trainer(options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refuse_other_wrappers({f"ACCELERATE_USE_{key}": "false", "ACCELERATE_USE_CPU": "true"})


def test_one_process_has_nothing_to_share_out(tmp_path: Path) -> None:
    for kind in ("ddp", "fsdp"):
        train(tmp_path / kind, Follow(), parallel=kind, ema_decay=0.9)
    assert_close(saved(tmp_path / "fsdp")[0], saved(tmp_path / "ddp")[0], **EXACT)
    assert rows(tmp_path / "fsdp") == rows(tmp_path / "ddp")


def test_blocks_are_gathered_alone_and_the_rest_with_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import _unet

    def chosen(module: nn.Module, unit: int) -> list[str]:
        monkeypatch.setattr(parallel, "UNIT", unit)
        return list(parallel._units(module))

    blocks = Blocks()
    assert chosen(blocks, 38) == ["blocks.2", "blocks.1", "blocks.0", ""]  # 3 x 5 + 5 and 5 x 3 + 3
    assert chosen(blocks, 39) == [""]
    blocks.blocks[1] = nn.Sequential(blocks.blocks[1])  # a list of several classes is one block's layers
    assert chosen(blocks, 1) == [""]
    blocks.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(9, 9)]) for _ in range(2))  # a list has no forward to hook
    assert chosen(blocks, 1) == ["blocks.1.0", "blocks.0.0", ""]

    unet = _unet()
    middle = ["mid_block.resnets.1", "mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0"]
    assert chosen(unet, 5000) == [*middle, "up_blocks.0.resnets.1", "up_blocks.0.resnets.0", ""]
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in chosen(unet, 1000)
    assert chosen(unet, 1_000_000) == [""]
