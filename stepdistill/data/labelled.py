"""Labelled images for classifiers: one object of the demo world, folders of classes, data sets of `datasets`. Kept as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..batch import Batch
from ..demo.world import ATTRIBUTES, COLOUR_NAMES, SHAPES, TEST_SEED, TRAIN_SEED, Thing, render, scene
from ..errors import InputError
from ..randomness import StepRandom, key

FORM = (
    'give --data.path "demo", a folder with a folder of images for each class (or train/ and test/ with those in them), or a '
    "data set of `datasets` with columns of images and class labels, such as cifar10"
)
CENTRE, NEARER, STRAY = (
    32.0,
    1.75,
    0.4,
)  # in a 64x64 image: objects of radius 17 to 23, 9 pixels from the middle at most
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOUR_NAMES)  # of the demo


@dataclass
class LabelledConfig:
    """Images with classes.

    Attributes:
        path: "demo" (one object of the demo world; its shape and colour are its class), a folder of classes, or a data set of
            the `datasets` library.
        split: of a data set, to train on.
        test_split: to measure on; without such a split a tenth of the images is held out.
        image_column: of a data set.
        label_column: of a data set; class names or numbers.
        resolution: side of the square images, cut from the centre.
        images: how many the teacher is trained on; of the demo as many as asked for, else all by default.
        labelled: how many of them the students have, each with its label; few of them are what makes a teacher useful.
        test_images: how many are measured on; of the demo as many as asked for, else all by default.
        random_flip: mirror half of the images.
        random_shift: move the images by up to so many pixels.
    """

    path: str = "demo"
    split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    resolution: int = 64
    images: int | None = None
    labelled: int | None = None
    test_images: int | None = None
    random_flip: bool = False
    random_shift: int = 0

    def __post_init__(self) -> None:
        for name in ("path", "split", "test_split", "image_column", "label_column"):
            if not vars(self)[name]:
                raise InputError(f"expected a name, got an empty {name}; fix --data.{name}")
        for name in ("images", "labelled", "test_images"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise InputError(f"expected {name} >= 1, got {value}; fix --data.{name}")
        if self.resolution < 8:
            raise InputError(f"expected 8 pixels or more, got {self.resolution}; fix --data.resolution")
        if not 0 <= self.random_shift < self.resolution:
            raise InputError(f"expected a shift in [0, resolution), got {self.random_shift}; fix --data.random_shift")


class LabelledImages:
    """A data set of images with classes.

    Args:
        images: uint8 [N, 3, R, R].
        labels: int64 [N].
        classes: their names.
        flip: whether each step mirrors half of them.
        shift: each step moves them by up to so many pixels; what comes in from outside is the edge, repeated.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], flip: bool = False, shift: int = 0
    ) -> None:
        self.images, self.labels, self.classes, self.flip, self.shift = images, labels, tuple(classes), flip, shift

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int | None) -> LabelledImages:
        """The first `count` of them, or all; InputError for more than there are."""
        if count is not None and count > len(self):
            raise InputError(f"expected up to {len(self)} images, got {count}; fix --data.images or --data.labelled")
        return LabelledImages(self.images[:count], self.labels[:count], self.classes, self.flip, self.shift)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, 3, R, R] in [-1, 1], as they are."""
        return self.images[torch.as_tensor(indices, dtype=torch.int64)].float().div(127.5).sub(1.0)

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        """x0 in [-1, 1], mirrored and moved by the streams "flip" and "shift", and `labels` [B]."""
        x0 = self.pixels(indices)
        if self.flip:
            mirrored = rng.uniform("flip") < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        if self.shift:
            moves = rng.integers("shift", 0, 2 * self.shift + 1, (2,)).tolist()
            side = x0.shape[-1]
            wide = torch.nn.functional.pad(x0, (self.shift,) * 4, mode="replicate")
            x0 = torch.stack([w[:, a : a + side, b : b + side] for w, (a, b) in zip(wide, moves, strict=True)])
        return Batch(x0, {}, {}, rng, {"labels": self.labels[torch.as_tensor(indices, dtype=torch.int64)]})


def open_labelled(config: LabelledConfig) -> tuple[LabelledImages, LabelledImages]:
    """(training, test) images that `config` names. Raises InputError."""
    if config.path == "demo":
        train = _objects(TRAIN_SEED, config.images or 4000, config.resolution)
        test = _objects(TEST_SEED, config.test_images or 1000, config.resolution)
    else:
        train, test = (
            part.first(n) for part, n in zip(_table(config), (config.images, config.test_images), strict=True)
        )
    train.flip, train.shift = config.random_flip, config.random_shift
    if config.labelled is not None and config.labelled > len(train):
        raise InputError(f"expected up to {len(train)} labelled images, got {config.labelled}; fix --data.labelled")
    return train, test


def class_names(config: LabelledConfig) -> tuple[str, ...]:
    """The classes of what `config` names, in the order of their numbers; no image is decoded. Raises InputError."""
    return CLASSES if config.path == "demo" else _classes(_rows(config, config.split), config)


def _objects(seed: int, count: int, resolution: int) -> LabelledImages:
    """Scenes of the world with their first object alone, seen from near: 48 classes of shape and colour on any ground."""
    images, labels = [], []
    shapes, colours = ATTRIBUTES["first shape"], ATTRIBUTES["first colour"]
    for i in range(count):
        found = scene(seed, i)
        near = _near(found.first)
        images.append(torch.from_numpy(render(replace(found, first=near, second=near), resolution)).permute(2, 0, 1))
        labels.append(shapes.index(found.first.shape) * len(colours) + colours.index(found.first.colour))
    return LabelledImages(torch.stack(images), torch.tensor(labels), CLASSES)


def _near(thing: Thing) -> Thing:
    """The same object larger and nearer to the middle: a ResNet's stem leaves a quarter of the pixels a side."""
    x, y = (CENTRE + STRAY * (place - CENTRE) for place in (thing.cx, thing.cy))
    return replace(thing, cx=x, cy=y, radius=NEARER * thing.radius)


def _table(config: LabelledConfig) -> tuple[LabelledImages, LabelledImages]:
    """The two splits of a data set, or of a folder of classes; a tenth held out by its bytes where there is but one."""
    rows = _rows(config, config.split)
    classes = _classes(rows, config)
    train = _decoded(rows, config, classes)
    try:
        test = _decoded(_rows(config, config.test_split), config, classes)
    except InputError as error:
        if "split" not in str(error):
            raise
        held_out = torch.tensor(
            [key("held out", image.numpy().tobytes().hex())[0] < 2**64 // 10 for image in train.images]
        )
        if held_out.all() or not held_out.any():
            raise InputError(
                f"expected images to train on and to measure on in {config.path!r}, got {len(train)} in all"
            ) from error
        test = LabelledImages(train.images[held_out], train.labels[held_out], classes)
        train = LabelledImages(train.images[~held_out], train.labels[~held_out], classes)
    # what comes first is to be of all classes: rows often lie in their order
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return LabelledImages(train.images[order], train.labels[order], classes), test


def _rows(config: LabelledConfig, split: str) -> Any:
    import datasets

    from ..families.loading import is_local
    from .folder import SUFFIXES, suffix, visible
    from .hub import load_rows

    place = Path(config.path).expanduser()
    if place.is_dir() and any(suffix(name) in SUFFIXES for name in visible(place)):
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(place), split=split, drop_labels=False)
        except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"expected split {split!r} of classes in {config.path!r}, got: {reason}; {FORM}"
            ) from error
    if is_local(config.path) and not place.exists():
        raise InputError(f"expected labelled images at {config.path!r}, got nothing there; {FORM}")
    return load_rows(config.path, split)


def _classes(rows: Any, config: LabelledConfig) -> tuple[str, ...]:
    """Names of the classes, in the order of their numbers."""
    import datasets

    for name, flag in ((config.image_column, "--data.image_column"), (config.label_column, "--data.label_column")):
        if name not in rows.column_names:
            raise InputError(f"expected a column {name!r} in {config.path!r}, got {rows.column_names}; fix {flag}")
    feature = rows.features[config.label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    found = {str(value) for value in rows[config.label_column]}
    return tuple(sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def _decoded(rows: Any, config: LabelledConfig, classes: Sequence[str]) -> LabelledImages:
    import datasets

    feature = rows.features[config.label_column]
    named = isinstance(feature, datasets.ClassLabel)
    labels = [int(v) if named else classes.index(str(v)) for v in rows[config.label_column]]
    if named and min(labels, default=0) < 0:
        raise InputError(f"expected a class in every row of {config.path!r}, got none in some; use another split")
    images = [_square(row[config.image_column], config.resolution) for row in rows]
    if not images:
        raise InputError(f"expected images in {config.path!r}, got none; {FORM}")
    return LabelledImages(torch.stack(images), torch.tensor(labels), classes)


def _square(image: Any, side: int) -> Tensor:
    """uint8 [3, side, side], the centre."""
    import numpy as np

    if not isinstance(image, Image.Image):
        raise InputError(f"expected images, got {type(image).__name__}; fix --data.image_column")
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cut = scaled.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)
