"""Real images as numbers: what is kept of which, files, and the folder or world that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sweeping import Corners
from tiny import tiny_images

from stepdistill.bench import reference as module
from stepdistill.bench.features import to_images
from stepdistill.bench.real import DataImages, WorldImages
from stepdistill.bench.reference import Reference
from stepdistill.demo.world import REFERENCE_SEED, TEST_SEED, World
from stepdistill.errors import InputError


class Shades:
    """Image i has the shade i; some can't be read."""

    source, hash = "shades", "s1"

    def __init__(self, count: int = 40, bad: Sequence[int] = (), step: int = 7) -> None:
        self.count, self.bad, self.step = count, set(bad), step

    def order(self) -> Sequence[int]:
        return [i * self.step % self.count for i in range(self.count)]

    def read(self, indices: Sequence[int], resolution: int) -> list[Any]:
        shape = (resolution, resolution, 3)
        return [None if i in self.bad else np.full(shape, i % 256, np.uint8) for i in indices]


def features_of(shades: Sequence[int]) -> torch.Tensor:
    return torch.tensor(shades, dtype=torch.float64)[:, None].expand(-1, 12) / 255


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 9)  # parts that do not divide the whole


def test_moments_of_all_that_is_not_held_out() -> None:
    seen: list[tuple[int, int]] = []
    found = Reference.measure(Corners(), Shades(), 8, held=11, kept=13, progress=lambda *n: seen.append(n))
    order = list(Shades().order())
    expected = features_of(order[:29])
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(expected.numpy(), rowvar=False), rtol=1e-9)
    torch.testing.assert_close(found.features, expected[:13].float())
    torch.testing.assert_close(found.held, features_of(order[29:]).float())
    assert found.mean.dtype == found.cov.dtype == torch.float64 and found.count == 29
    assert seen[-1] == (40, 40) and seen[0] == (9, 40)


def test_all_features_where_there_are_few() -> None:
    found = Reference.measure(Corners(), Shades(), 8)
    assert len(found.features) == 40 and found.held.shape == (0, 12)


def test_images_that_cant_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list(Shades(200).order())
    found = Reference.measure(Corners(), Shades(200, bad=order[3:4] + order[-1:]), 8, held=50)
    assert found.count == 148 and len(found.features) == 148
    torch.testing.assert_close(found.features[2:4], features_of([order[2], order[4]]).float())
    # the one that is missing of those held out is made up for, or a sweep of 50 would have no floor
    torch.testing.assert_close(found.held, features_of(order[149:199]).float())
    with pytest.raises(InputError, match=r"can be read in shades, got 3 that can't"):
        Reference.measure(Corners(), Shades(200, bad=order[:3]), 8)
    for where in (order[:2], order[2:4]):
        with pytest.raises(InputError, match="2 real images or more beside 197 that are held out, got [01] in shades"):
            Reference.measure(Corners(), Shades(200, bad=where), 8, held=197)
    with pytest.raises(InputError, match="beside 298 that are held out, got 0 in shades"):
        Reference.measure(Corners(), Shades(300, bad=range(3)), 8, held=298)
    monkeypatch.setattr(Shades, "read", lambda *_: pytest.fail("read"))  # what is known before is said before
    with pytest.raises(InputError, match="beside 39 that are held out, got 1 in shades; give more --data"):
        Reference.measure(Corners(), Shades(), 8, held=39)


def test_a_file_reads_back(tmp_path: Path) -> None:
    found = Reference.measure(Corners(), Shades(), 8, held=5)
    path = tmp_path / "new" / "real.safetensors"
    found.save(path)
    back = Reference.load(path, Corners())
    for name in ("mean", "cov", "features", "held"):
        assert torch.equal(vars(back)[name], vars(found)[name])
    assert back.about == found.about and back.count == 35
    data = path.read_bytes()
    found.save(path)
    assert path.read_bytes() == data and [p.name for p in path.parent.iterdir()] == ["real.safetensors"]
    with pytest.raises(InputError, match=r"expected to write '.*', got: .*or give another --make_reference"):
        found.save(path / "x.safetensors", "--make_reference")


def test_files_of_another_kind_or_extractor(tmp_path: Path) -> None:
    path = tmp_path / "real.safetensors"
    with pytest.raises(InputError, match="got nothing at .*--make_reference"):
        Reference.load(path, Corners())
    for data in (b"no such thing", None):
        if data is None:
            save_file({"mean": torch.zeros(2)}, path)
        else:
            path.write_bytes(data)
        with pytest.raises(InputError, match="expected reference statistics, got"):
            Reference.load(path, Corners())
    found = Reference.measure(Corners(), Shades(), 8)
    replace(found, about={**found.about, "features": {"name": "other", "hash": "1", "dim": 12}}).save(path)
    with pytest.raises(InputError, match=r"by corners \(0c\), got those by other \(1\)"):
        Reference.load(path, Corners())


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    path, reads = tmp_path / "real.safetensors", list[int]()

    class Watched(Shades):
        def read(self, indices: Sequence[int], resolution: int) -> list[Any]:
            reads.extend(indices)
            return super().read(indices, resolution)

    first = Reference.remembered(path, Corners(), Watched(), 8, 5)
    again = Reference.remembered(path, Corners(), Watched(), 8, 5)
    assert len(reads) == 40 and torch.equal(first.held, again.held)
    other = Watched()
    other.hash = "s2"
    for images, resolution, held in ((other, 8, 5), (Watched(), 16, 5), (Watched(), 16, 6)):
        reads.clear()
        Reference.remembered(path, Corners(), images, resolution, held)
        assert len(reads) == 40
    path.write_bytes(b"")
    assert Reference.remembered(path, Corners(), Watched(), 16, 6).count == 34


def test_the_world_is_read_in_its_order() -> None:
    found = Reference.measure(Corners(), WorldImages(12), 16, kept=5)
    expected = Corners()(to_images(World(REFERENCE_SEED, 16).pixels(range(12))))
    torch.testing.assert_close(found.features, expected[:5].float())
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-12)
    assert found.of_the_demo and "seed 202" in found.about["source"] and found.count == 12
    test = Corners()(to_images(World(TEST_SEED, 16).pixels(range(12))))
    assert float(torch.cdist(test, expected).min()) > 1e-3  # none of what the prompts came from


def test_a_folder_of_images(tmp_path: Path) -> None:
    folder = tiny_images(tmp_path / "photos", count=9, resolution=40)
    images = DataImages(str(folder))
    assert images.source == f"{folder} (9 images)" and images.hash == DataImages(str(folder)).hash
    order = images.order()
    assert sorted(order) == list(range(9)) and list(order) != list(range(9))
    found = images.read([4, 2], 40)
    for index, picture in zip((4, 2), found, strict=True):
        with Image.open(folder / f"{index:02d}.png") as file:
            assert np.array_equal(picture, np.asarray(file))  # back from [-1, 1] to the same levels
    assert images.read([0], 16)[0].shape == (16, 16, 3)  # type: ignore[union-attr]
    assert (images.held(4), images.held(5), images.held(None)) == (4, 1, 1)
    assert not Reference.measure(Corners(), images, 16, held=3).of_the_demo
    (folder / "07.png").write_bytes(b"broken")
    assert DataImages(str(folder)).read([7], 16) == [None]
    assert DataImages(str(folder)).hash != images.hash


def test_data_that_holds_no_images(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    with pytest.raises(InputError, match="expected images in --data, got prompts"):
        DataImages(str(prompts))
    with pytest.raises(InputError, match="2 real images or more in --data .*one, got 1; give more"):
        DataImages(str(tiny_images(tmp_path / "one", count=1)))
    with pytest.raises(InputError, match="nothing there; give --data "):
        DataImages(str(tmp_path / "nothing"))
