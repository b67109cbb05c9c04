"""What is kept of images: hashes in closed form, files that are whole, names of scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeping import Corners, Greens, small_plan
from torch import Tensor

from stepdistill.bench.features import Images
from stepdistill.bench.samples import Samples, image_hashes, is_whole, measured, read_samples, write_tensors
from stepdistill.errors import InputError


def test_hashes_are_of_all_bytes() -> None:
    images = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    images[2] = images[1]
    images[2, -1, -1, -1] ^= 1  # the very last one
    found = image_hashes(images)
    assert found.dtype == torch.int64 and len(found.unique()) == 3
    for value, image in zip(found.tolist(), images, strict=True):
        assert value % 2**64 == int(hashlib.sha256(image.tobytes()).hexdigest()[:16], 16)
    assert torch.equal(image_hashes(images[:, :, ::-1, :][:, :, ::-1, :]), found)  # whatever lies in memory how


def test_copies_are_counted() -> None:
    """As a padded sampler, or a model that collapsed, would leave them."""
    images = np.random.default_rng(0).integers(256, size=(10, 4, 4, 3), dtype=np.uint8)
    assert Samples(torch.zeros(10, 1), None, {}, image_hashes(images), 0.0).copies == 0
    images[[4, 7]] = images[1]
    assert Samples(torch.zeros(10, 1), None, {}, image_hashes(images), 0.0).copies == 2
    assert Samples(torch.zeros(10, 1), None, {}, None, 0.0).copies == 0


class Single(Greens):
    """Gives one number, under a name of its own."""

    names = ("clip",)  # type: ignore[assignment]

    def __call__(self, prompts: Sequence[str], images: Images) -> dict[str, Tensor]:
        return {"clip": super().__call__(prompts, images)["all"]}


def test_a_scorer_of_one_number_gives_the_quantity_itself() -> None:
    images = np.random.default_rng(0).integers(256, size=(2, 4, 4, 3), dtype=np.uint8)
    found = measured(images, ["a", "bc"], Corners(), {"clip_score": Single(), "accuracy": Greens()})
    assert set(found) == {"features", "score/clip_score", "score/accuracy", "score/accuracy/length"}
    assert found["score/clip_score"].dtype == torch.float64 and found["features"].dtype == torch.float32
    assert torch.equal(found["score/accuracy/length"], torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_files_that_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    assert not is_whole(path)
    write_tensors(path, {"x": torch.arange(4.0).reshape(2, 2).T})
    data = path.read_bytes()
    assert is_whole(path) and [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    for cut in (data[:-1], data[:4], b""):
        path.write_bytes(cut)
        assert not is_whole(path)
        with pytest.raises(InputError, match="samples of a cell in '.*a.safetensors', got: .*; delete the folder"):
            read_samples(path, small_plan())
