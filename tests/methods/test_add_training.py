"""ADD through the real Trainer: a one-step generator reaches a mixture; killed, or cut otherwise, a game is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import MEANS, WEIGHTS, Pixels, Pixelwise, Prompted, mixture, mixture_samples
from eyes import add_config, show
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, Killed, options, rows, same, saved, stopping_after, weights

from stepdistill.methods.add import ADD
from stepdistill.networks.image_features import ImageFeatures, blocks
from stepdistill.training.trainer import Trainer

BOUND = 0.2  # see test_ladd_training.py for what it tells apart


class Pixelwise3(nn.Module):
    """Two blocks that see each pixel by itself, at several levels: soft steps, as an eye's first layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)])
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.blocks[0].weight.fill_(1.5 / 3)
            self.blocks[0].bias.copy_(1.5 * torch.linspace(-2.5, 2.5, 16))
            self.blocks[1].weight.copy_(torch.randn((16, 16, 1, 1), generator=draws) / 2)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = self.blocks[1](self.blocks[0](pixel_values).tanh())
        return {"last_hidden_state": x.flatten(2).transpose(1, 2)}


def transport(x: Tensor, y: Tensor) -> float:
    """W1 of two samples of one size."""
    return float((x.flatten().sort().values - y.flatten().sort().values).abs().mean())


def truth(n: int) -> Tensor:
    draws = torch.Generator().manual_seed(77)
    return mixture_samples(torch.randn(n, generator=draws), torch.rand(n, generator=draws))


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 4))])
def test_a_one_step_generator_reaches_both_modes_with_their_weights(tmp_path: Path, seed: int) -> None:
    """Heads on what a simple network sees in the pictures, and no loss but theirs."""
    given = add_config(
        times="1", probabilities="1", warmup_probabilities="1", head_width=16, r1_every=4, guard_every=0,
        distillation=0.0, augmentations="",
    )  # fmt: skip
    net, student = Pixelwise3(), Pixelwise(seed=seed)
    eye = ImageFeatures(net, blocks(net), (16, 16), (0.5,) * 3, (0.5,) * 3)
    method = ADD(given, student, mixture(), eye, lambda latents: latents, (1, 16, 16), {}, seed)
    noise = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    start = student(noise, torch.ones(4).double(), {}).x0.detach()
    assert transport(start, truth(start.numel())) > 2.5 * BOUND
    train = options(
        max_train_steps=200, train_batch_size=4, learning_rate=5e-3, lr_scheduler="cosine", adam_beta1=0.0, adam_beta2=0.99,
        adam_weight_decay=0.0, checkpointing_steps=10**6, seed=seed,
    )  # fmt: skip
    Trainer(train, tmp_path).fit(method, Pixels())
    found = student(noise, torch.ones(4).double(), {}).x0.detach()
    assert transport(found, truth(found.numel())) < BOUND
    # equal weights would be .2 off; .065 was seen, by how a CPU rounds
    assert abs(float((found < 0).float().mean()) - WEIGHTS[0]) < 0.1
    assert MEANS[0] < 0 < MEANS[1]


# -- killed and resumed ----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "max_train_steps": 6, "train_batch_size": 4, "checkpointing_steps": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "warmup_steps": 3, "warmup_probabilities": (0.0, 0.0, 0.5, 0.5), "r1_every": 2, "guard_every": 2, "crop": 3,
    "image_condition": True,
}  # fmt: skip


def play(folder: Path, kind: str, seed: int = 0, **changes: Any) -> ADD:
    method = show(kind, seed=seed, **OPTIONS)
    Trainer(options(**{**SETTINGS, **changes}), folder).fit(method, Prompted())
    return method


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    wanted = play(tmp_path / "whole", kind)
    for death in (3, 4, 5):
        folder = tmp_path / f"killed-{death}"
        dying = show(kind, **OPTIONS)
        with pytest.raises(Killed), stopping_after(dying, death, Killed.now):
            Trainer(options(**SETTINGS), folder).fit(dying, Prompted())
        found = play(folder, kind, seed=9, resume_from_checkpoint="latest")  # heads of other first weights
        same(folder, tmp_path / "whole")
        assert_close(weights(found), weights(wanted), **EXACT)
        assert found.taken == 6 and found.guard.state_dict() == wanted.guard.state_dict()
    tensors, state = saved(tmp_path / "whole")
    assert {name.split("/")[0] for name in tensors} >= {"student.ema", "student.optimizer", "discriminator.optimizer"}
    assert not [name for name in tensors if "up." in name or "blocks" in name], "neither eye nor decoder is saved"
    assert state["method"]["taken"] == 6 and state["method"]["guard"]["accuracy"] != 0.5


# -- cut in other ways -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("more", [{}, {"distance": "pixels", "w": 0.5, "loss_type": "non_saturating"}])
def test_the_same_global_batch_in_other_parts_is_the_same_game(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    """1 x 8 == 2 x 4 == 8 x 1, in every tensor of both roles, the spectral vectors and the metrics."""
    folders: list[Path] = []
    for size in (8, 4, 1):
        folders.append(tmp_path / str(size))
        # with its default epsilon Adam would make a whole step of a gradient that is nothing but rounding
        train = options(
            max_train_steps=4,
            train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            adam_epsilon=1e-3,
            ema_decay=0.9,
        )
        Trainer(train, folders[-1]).fit(show(kind, **{**OPTIONS, **more}), Prompted())
    (tensors, state), told = saved(folders[0]), rows(folders[0])
    for other in folders[1:]:
        found, its_state = saved(other)
        assert_close(found, tensors, rtol=1e-4, atol=1e-6)
        assert_close(rows(other), told, rtol=1e-4, atol=1e-5)
        assert its_state["method"]["taken"] == state["method"]["taken"] == 4


def test_the_guard_looks_after_the_warm_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A student whose samples do not depend on the noise."""
    method = show(guard_every=1, warmup_steps=4)
    with torch.no_grad():
        method.student.module.last.weight.zero_()  # type: ignore[union-attr,operator]
    method.student.predicts = "x0"
    Trainer(options(max_train_steps=12, train_batch_size=4, learning_rate=1e-9), tmp_path).fit(method, Prompted())
    (line,) = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert line.startswith("step 9: the student has collapsed")  # five looks from the fifth step on
