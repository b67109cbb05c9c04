"""Extractors own dtype, range and size: what fits is scaled rightly, what doesn't is refused."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from stepdistill.bench.features import JudgeFeatures, checked_images, hash_weights, to_images, to_levels, to_pixels
from stepdistill.bench.judge import Judge
from stepdistill.demo.world import World, render, scene
from stepdistill.errors import InputError


def images(n: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def judge(seed: int = 0) -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Judge({"shape": 3, "colour": 2}, resolution=16, width=4, dense=6)


def test_pixels_and_back() -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_pixels(ramp)
    assert (pixels.min(), pixels.max(), pixels.shape) == (-1.0, 1.0, (1, 3, 16, 16))
    np.testing.assert_array_equal(to_images(pixels), ramp)
    np.testing.assert_array_equal(to_images(torch.tensor([[[[-1.5]], [[0.0]], [[1.5]]]])), [[[[0, 128, 255]]]])


def test_pixels_are_those_of_the_world() -> None:
    torch.testing.assert_close(to_pixels(render(scene(7, 3))[None]), World(7).pixels([3]), atol=0, rtol=0)
    np.testing.assert_array_equal(to_images(World(7).pixels([3])), render(scene(7, 3))[None])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(2).astype(np.float32) / 255, "uint8"),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "NumPy"),
        ([images(1)], "NumPy"),
        (images(2).transpose(0, 3, 1, 2), "channels last"),
        (images(2)[0], "channels last"),
        (images(2)[:0], "channels last"),
        ((images(2) / 255).astype(np.uint8) | 1, "only 0 and 1"),
    ],
)
def test_wrong_form_is_refused(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_images(bad)
    with pytest.raises(ValueError, match=message):
        JudgeFeatures(judge())(bad)


def test_black_images_are_images() -> None:
    checked_images(np.zeros((2, 8, 8, 3), dtype=np.uint8))
    checked_images(np.full((2, 8, 8, 3), 2, dtype=np.uint8))


def test_arrays_as_pillow_makes_them() -> None:
    """Read-only, and mirrored without a copy; what is scaled is a copy."""
    batch = images(2)
    kept = batch.copy()
    pixels = to_pixels(batch)
    pixels.zero_()
    np.testing.assert_array_equal(batch, kept)
    batch.setflags(write=False)
    torch.testing.assert_close(to_pixels(batch[:, :, ::-1]), to_pixels(kept[:, :, ::-1].copy()))
    levels = to_levels(batch)
    assert levels.dtype == torch.uint8 and levels.is_contiguous()
    np.testing.assert_array_equal(levels.numpy(), kept.transpose(0, 3, 1, 2))
    JudgeFeatures(judge())(batch)


def test_judge_features_are_the_judges() -> None:
    net, batch = judge(), images(7)
    extractor = JudgeFeatures(net, batch_size=3)
    features = extractor(batch)
    assert (features.dtype, tuple(features.shape), extractor.dim) == (torch.float64, (7, 14), 8 + 6)
    torch.testing.assert_close(features, net.features(to_pixels(batch)).double(), rtol=1e-5, atol=1e-6)  # in threes
    for name, logits in extractor.logits(batch).items():
        torch.testing.assert_close(logits, net(to_pixels(batch))[name])
    for wrong in (images(2, size=32), images(2)[:, :8], images(2)[:, :, :8]):
        with pytest.raises(
            InputError, match=rf"16x16 images for --features demo, got {wrong.shape[1]}x{wrong.shape[2]};"
        ):
            extractor(wrong)


def test_the_judge_does_not_learn() -> None:
    net = judge().train()
    assert not JudgeFeatures(net)(images(1)).requires_grad and not net.training


def test_weights_hash_tells_weights_apart() -> None:
    assert hash_weights(judge(0)) == hash_weights(judge(0))
    changed = judge(0)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    assert (
        len({hash_weights(judge(0)), hash_weights(judge(1)), hash_weights(changed), hash_weights(judge(0).half())}) == 4
    )


def test_weights_hash_by_hand() -> None:
    """The first line of a results file depends on it: another form would set new files apart from older ones."""
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0), layer.bias.fill_(-1.0)
    written = (
        b"bias|torch.float32|(1,)|"
        + np.float32(-1).tobytes()
        + b"weight|torch.float32|(1, 1)|"
        + np.float32(2).tobytes()
    )
    assert hash_weights(layer) == hashlib.sha256(written).hexdigest()[:16]
    assert hash_weights(layer, "what else") == hashlib.sha256(written + b"what else").hexdigest()[:16]
    norm = torch.nn.BatchNorm1d(2)  # buffers, one of them a scalar, count too
    hashes = {hash_weights(norm)}
    for change in (norm.running_mean.add_, norm.num_batches_tracked.add_):
        change(1)
        hashes.add(hash_weights(norm))
    assert len(hashes) == 3
