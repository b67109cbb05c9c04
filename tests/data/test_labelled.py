"""Labelled images: one object of the demo world, folders of classes, tables; what a step does to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from toys import EXACT

from stepdistill.data.labelled import LabelledConfig, LabelledImages, open_labelled
from stepdistill.demo.world import TEST_SEED, TRAIN_SEED, labels, scene
from stepdistill.errors import InputError
from stepdistill.randomness import StepRandom

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def folder_of(path: Path, each: int = 4, classes: Any = COLOURS, size: tuple[int, int] = (24, 16)) -> Path:
    for name, colour in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8) + np.array(colour, dtype=np.uint8)
            pixels[2, 12] = i  # each a picture of its own
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return path


def test_the_demo_shows_one_object_whose_shape_and_colour_are_its_class() -> None:
    train, test = open_labelled(LabelledConfig(images=12, test_images=5))
    assert len(train.classes) == 48 and train.images.shape == (12, 3, 64, 64) and len(test) == 5
    for seed, part in ((TRAIN_SEED, train), (TEST_SEED, test)):
        for i in range(len(part)):
            found = scene(seed, i)
            assert part.classes[int(part.labels[i])] == f"{found.first.colour} {found.first.shape}"
            assert int(part.labels[i]) == labels(found)[1] * 8 + labels(found)[2]
    found = scene(TRAIN_SEED, 0)
    centre = train.images[0, :, round(found.second.cy), round(found.second.cx)].float()
    from stepdistill.demo.world import COLOURS as PAINT

    assert (centre - torch.tensor(PAINT[found.second.colour]).float()).abs().max() > 30, (
        "the second object is not there"
    )


def test_a_folder_of_classes_with_a_test_split(tmp_path: Path) -> None:
    folder_of(tmp_path / "train")
    folder_of(tmp_path / "test", each=2)
    train, test = open_labelled(LabelledConfig(str(tmp_path), resolution=16))
    assert train.classes == ("blue", "green", "red") and len(train) == 12 and len(test) == 6
    for part in (train, test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert tuple(image[:, 8, 8].tolist()) == COLOURS[part.classes[int(label)]]
    assert len(set(train.labels[:6].tolist())) > 1, "the first are not all of one class"
    assert_close(open_labelled(LabelledConfig(str(tmp_path), resolution=16))[0].labels, train.labels, **EXACT)


def test_without_a_test_split_some_are_held_out_by_their_own_bytes(tmp_path: Path) -> None:
    folder_of(tmp_path / "all", each=20)
    train, test = open_labelled(LabelledConfig(str(tmp_path / "all"), resolution=16))
    assert len(train) + len(test) == 60 and 1 <= len(test) <= 15
    kept = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in kept for image in test.images)


def test_rows_of_a_data_set_with_names_for_labels(tmp_path: Path) -> None:
    import datasets

    folder_of(tmp_path / "images", each=20)
    rows = [{"image": str(f), "label": f.parent.name} for f in sorted((tmp_path / "images").rglob("*.png"))]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    train, _ = open_labelled(LabelledConfig(str(tmp_path / "table"), resolution=16))
    assert train.classes == ("blue", "green", "red")
    assert all(
        tuple(i[:, 8, 8].tolist()) == COLOURS[train.classes[int(n)]]
        for i, n in zip(train.images, train.labels, strict=True)
    )
    with pytest.raises(InputError, match="--data.label_column"):
        open_labelled(LabelledConfig(str(tmp_path / "table"), label_column="no"))


def test_images_are_mirrored_and_moved_by_the_streams_of_their_step() -> None:
    images = (
        torch.arange(2 * 3 * 8 * 8, dtype=torch.int64)
        .remainder(256)
        .to(torch.uint8)
        .view(2, 3, 8, 8)
        .repeat(16, 1, 1, 1)
    )
    plain = LabelledImages(images, torch.arange(32), "abc")
    rng = StepRandom(0, 3, range(32))
    assert_close(plain.batch(range(32), rng).x0, images.float() / 127.5 - 1)
    changed = LabelledImages(images, torch.arange(32), "abc", flip=True, shift=2)
    whole = changed.batch(range(32), rng)
    assert_close(whole.extra["labels"], torch.arange(32), **EXACT)
    assert_close(changed.batch(range(8, 12), StepRandom(0, 3, range(8, 12))).x0, whole.x0[8:12], **EXACT)
    mirrored = LabelledImages(images, torch.arange(32), "abc", flip=True).batch(range(32), rng).x0
    same = [bool((a == b).all()) for a, b in zip(mirrored, plain.pixels(range(32)), strict=True)]
    assert 8 < sum(same) < 24
    assert all(
        s or bool((a == b.flip(-1)).all()) for s, a, b in zip(same, mirrored, plain.pixels(range(32)), strict=True)
    )
    moved = LabelledImages(images, torch.arange(32), "abc", shift=2).batch(range(32), rng).x0
    inside = {(a, b) for x in moved for a in range(5) for b in range(5) if shifted(x, plain.pixels([0])[0], a, b)}
    assert len(inside) > 6


def shifted(found: torch.Tensor, image: torch.Tensor, a: int, b: int) -> bool:
    wide = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
    return bool((found == wide[:, a : a + 8, b : b + 8]).all())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"path": ""}, "--data.path"), ({"images": 0}, "--data.images"), ({"resolution": 4}, "--data.resolution"),
        ({"random_shift": 64}, "--data.random_shift"), ({"labelled": 0}, "--data.labelled"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        LabelledConfig(**change)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data.labelled"):
        open_labelled(LabelledConfig(images=4, labelled=5, test_images=1))
    folder_of(tmp_path / "few", each=20)
    with pytest.raises(InputError, match="--data.images"):
        open_labelled(LabelledConfig(str(tmp_path / "few"), resolution=16, images=100))
    with pytest.raises(InputError, match="nothing there"):
        open_labelled(LabelledConfig(str(tmp_path / "nothing")))
