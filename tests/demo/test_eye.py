"""How the demo's eye is taught: what is hidden, what the loss is taken on, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from toys import options, rows

from stepdistill.batch import Batch
from stepdistill.demo import eye, making, stages
from stepdistill.demo.world import EYE_SEED, REFERENCE_SEED, TEST_SEED, TRAIN_SEED, World
from stepdistill.errors import InputError
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

PIXELS = World(7).pixels(range(6))


def masking(**given) -> eye.Masking:
    return making.made(0, lambda: eye.Masking(eye.MaskingConfig(**given), eye.eye()))


def batch(size: int = 6, step: int = 0) -> Batch:
    return Batch(PIXELS[:size], {}, {}, StepRandom(0, step, range(size)))


def test_patches_are_in_rows():
    found = eye.patches(PIXELS)
    assert found.shape == (6, 64, 192)
    assert_close(found[2, 10].reshape(3, 8, 8), PIXELS[2, :, 8:16, 16:24], rtol=0, atol=0)


def test_as_many_patches_of_every_picture_are_hidden_others_each_time():
    method = masking(hidden=0.25)
    hidden = method.hidden(batch())
    assert hidden.shape == (6, 64) and hidden.sum(1).tolist() == [16] * 6
    assert len({tuple(row.tolist()) for row in hidden}) == 6
    assert_close(method.hidden(batch(3)), hidden[:3], rtol=0, atol=0)
    assert not torch.equal(method.hidden(batch(step=1)), hidden)


def test_the_loss_is_taken_on_hidden_patches_which_the_network_does_not_see():
    method, one = masking(augmentations=()), batch()
    losses, hidden = method.training_step(one), method.hidden(one)
    drawn = method.student.module(PIXELS, hidden)
    wanted = (drawn - eye.patches(PIXELS)).abs()[hidden].mean()
    assert losses.count == 6 and list(losses.terms) == ["masked"]
    assert_close(losses.total, wanted)
    other = PIXELS.clone()
    covered = hidden.reshape(6, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(other)
    other[covered] = 0.3
    assert_close(method.student.module(other, hidden), drawn)
    assert not torch.allclose(method.student.module(PIXELS, ~hidden), drawn, atol=1e-3)


def test_what_the_network_sees_is_augmented_and_so_is_what_it_has_to_draw():
    method, one = masking(augmentations=("colour",)), batch()
    from stepdistill.networks.augmentation import Augmentation

    tinted, hidden = Augmentation(("colour",), one.rng)(PIXELS), method.hidden(one)
    wanted = (method.student.module(tinted, hidden) - eye.patches(tinted)).abs()[hidden].mean()
    assert_close(method.training_step(one).total, wanted)


def test_it_learns(tmp_path: Path):
    data = stages.WorldPixels(World(7), 32)
    train = options(max_train_steps=25, train_batch_size=16, learning_rate=2e-3, checkpointing_steps=10**6)
    Trainer(train, tmp_path).fit(masking(), data)
    told = [row["masked"] for row in rows(tmp_path)]
    assert sum(told[-5:]) < 0.75 * sum(told[:5])


def test_its_world_is_nobody_elses():
    assert len({EYE_SEED, TRAIN_SEED, REFERENCE_SEED, TEST_SEED}) == 4


def test_what_is_saved_is_in_fp16_and_has_its_settings(tmp_path: Path):
    eye.save(tmp_path, making.made(0, eye.eye))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["size"] == {"height": 64, "width": 64} and settings["image_mean"] == [0.5] * 3
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "dinov2"
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2e6


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_bad_share(hidden: float):
    with pytest.raises(InputError, match=r"in \(0, 1\)"):
        eye.MaskingConfig(hidden=hidden)
