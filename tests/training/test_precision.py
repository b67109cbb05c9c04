"""Mixed precision, and activations computed again in backward."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import (
    EXACT,
    MEAN,
    STD,
    Numbers,
    network,
    options,
    rows,
    saved,
    sd_table,
    train,
)  # fmt: skip

from stepdistill.batch import Batch, Cond
from stepdistill.errors import InputError
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import LoraSpec
from stepdistill.networks.network import Network
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate fixes the precision once in a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Affine(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t.to(self.net[0].weight.dtype))


def test_in_bf16_the_adapter_stays_in_float32(tmp_path: Path, fresh_accelerate: None) -> None:
    trainer = Trainer(options(max_train_steps=3, mixed_precision="bf16"), tmp_path)
    assert trainer.weight_dtype == torch.bfloat16
    base = Affine(network(0).module.to(torch.bfloat16).requires_grad_(False), sd_table(), "eps")
    student = base.with_lora(LoraSpec(2, 2.0, ("0", "2")))
    before = weights_of(student), {n: p.clone() for n, p in base.module.named_parameters() if "lora" not in n}
    dtypes: list[torch.dtype] = []
    base.module[1].register_forward_pre_hook(lambda _, x: dtypes.append(x[0].dtype))
    trainer.fit(LCM(LCMConfig(), student, base), Numbers())
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in student.trainable()} == {torch.float32}
    assert {v.dtype for n, v in saved(tmp_path)[0].items() if n.startswith("student")} == {torch.float32}
    assert all(not torch.equal(v, before[0][n]) for n, v in weights_of(student).items() if "lora_B" in n)
    assert_close({n: p for n, p in base.module.named_parameters() if "lora" not in n}, before[1], **EXACT)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows(tmp_path))


def weights_of(net: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state().items()}


def test_another_precision_in_the_same_process_is_an_input_error(tmp_path: Path) -> None:
    Trainer(options(), tmp_path)
    with pytest.raises(InputError, match="mixed_precision"):
        Trainer(options(mixed_precision="bf16"), tmp_path)


class Prompted(Numbers):
    """Latents and prompts for the tiny Stable Diffusion."""

    def __init__(self) -> None:
        super().__init__(count=4, width=4 * 4 * 4)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        x0 = (self.x0[list(indices)] - MEAN) / STD
        text = torch.linspace(-1, 1, 24 * 16).reshape(1, 24, 16).expand(len(indices), -1, -1)
        return Batch(x0.reshape(-1, 4, 4, 4), {"prompt_embeds": text}, {"prompt_embeds": -text}, rng)


def test_gradient_checkpointing_recomputes_the_student_and_changes_nothing(tmp_path: Path) -> None:
    """Backward runs the blocks again when the teacher's turn is long over: the adapter must be on by then."""
    from tiny import _unet

    from stepdistill.families.unet import LCM_TARGETS, UNet

    runs, forwards = [], []
    for checkpointing in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher = UNet(_unet().eval(), sd_table(), "eps")
        student = teacher.with_lora(LoraSpec(2, 2.0, LCM_TARGETS))
        for i, parameter in enumerate(student.trainable()):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
        if checkpointing:
            student.checkpoint_activations()
        count: list[str | None] = []
        block = teacher.module.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, c=count, t=teacher: c.append(t.adapters.current))
        folder = tmp_path / str(checkpointing)
        train(folder, LCM(LCMConfig(), student, teacher), Prompted(), max_train_steps=2, train_batch_size=2)
        runs.append((weights_of(student), rows(folder)))
        forwards.append(count)
    assert forwards == [["student", None, "student"] * 2, ["student", None, "student", "student"] * 2]
    assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)
