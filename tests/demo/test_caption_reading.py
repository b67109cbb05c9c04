"""Captions read back: the very attributes that they were written from, and nothing for other texts."""

from __future__ import annotations

import pytest
import torch

from stepdistill.demo.reading import read_caption, read_labels
from stepdistill.demo.world import ATTRIBUTES, PHRASES, TEST_SEED, World, caption, scene, values
from stepdistill.errors import InputError

COUNT = 2_000


def test_captions_of_the_test_world_give_its_labels() -> None:
    world = World(TEST_SEED)
    labels = world.labels(range(COUNT))
    found = read_labels(world.captions(range(COUNT)))
    assert found.dtype == torch.int64 and torch.equal(found, labels)
    for column, names in zip(labels.unbind(1), ATTRIBUTES.values(), strict=True):
        assert set(column.tolist()) == set(range(len(names)))  # each value was there to be read


def test_the_captions_hold_every_synonym() -> None:
    """Else a phrase that cannot be read would not be noticed above."""
    text = "|".join(World(TEST_SEED).captions(range(COUNT)))
    ways = [way for name in PHRASES for options in PHRASES[name].values() for way in options]
    assert all(way.split("{}")[0] in text and way.split("{}")[-1] in text for way in ways)
    assert all(way in text for way in ("right of", "to the right of", "below", "under"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "a red disc to the left of a violet plus on gray stripes",
            ("beside", "circle", "red", "cross", "purple", "grey", "stripes"),
        ),
        (
            "a plain white background with a blue star under a orange hoop",
            ("stacked", "ring", "orange", "star", "blue", "white", "plain"),
        ),
        (
            "Pink square  right of cyan triangle, a dotted beige background",
            ("beside", "triangle", "cyan", "square", "pink", "cream", "dots"),
        ),
        (
            "on a checkered navy background, a green cross on top of a green cross",
            ("stacked", "cross", "green", "cross", "green", "navy", "checks"),
        ),
    ],
)
def test_written_out(text: str, found: tuple[str, ...]) -> None:
    assert read_caption(text) == found


def test_every_template_and_point_of_view_of_one_scene() -> None:
    one = scene(7, 0)
    texts = {caption(one, seed, 0) for seed in range(300)}
    assert len(texts) > 50
    assert {read_caption(text) for text in texts} == {values(one)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a red circle above a blue star",
        "a red circle above a blue star on white",
        "a crimson circle above a blue star on plain white",
        "a circle red above a blue star on plain white",
        "a red circle above a blue star on plain white, 4k",
        "not a red circle above a blue star on plain white",
        "a red circle above left of a blue star on plain white",
    ],
)
def test_other_texts(text: str) -> None:
    with pytest.raises(InputError, match="--prompts demo") as error:
        read_labels(["a red circle above a blue star on plain white", text])
    assert repr(text) in str(error.value)


def test_no_captions() -> None:
    assert read_labels([]).shape == (0, 7)
