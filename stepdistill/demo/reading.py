"""The demo world's captions, read back into the attributes that they name: the inverse of `world.caption`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from ..errors import InputError
from .world import _MIRRORED, _TEMPLATES, ATTRIBUTES, COLOUR_NAMES, PHRASES, SHAPES

Pair = tuple[str, str]


def _named(phrases: Mapping[str, tuple[str, ...]]) -> list[Pair]:
    """(way of naming, value) for all values."""
    return [(way, value) for value, ways in phrases.items() for way in ways]


@cache
def _things() -> dict[str, Pair]:
    """Phrase -> (shape, colour) of an object."""
    return {f"{c} {s}": (shape, colour) for (c, colour), (s, shape) in product(_named(COLOUR_NAMES), _named(SHAPES))}


@cache
def _relations() -> dict[str, tuple[str, bool]]:
    """Phrase -> (layout, whether the object before it is the first)."""
    ways = {way: (layout, True) for way, layout in _named(PHRASES["layout"])}
    return ways | {way: (layout, False) for way, layout in _named(_MIRRORED)}


@cache
def _grounds() -> dict[str, Pair]:
    """Phrase -> (ground, texture)."""
    grounds, textures = _named(PHRASES["ground"]), _named(PHRASES["texture"])
    return {way.format(g): (ground, texture) for (g, ground), (way, texture) in product(grounds, textures)}


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """One for each template; no caption fits two of them."""

    def any_of(name: str, phrases: Mapping[str, object]) -> str:
        return f"(?P<{name}>{'|'.join(phrases)})"

    slots: dict[str, Mapping[str, object]] = {
        "one": _things(),
        "other": _things(),
        "relation": _relations(),
        "ground": _grounds(),
    }
    fields = {name: any_of(name, phrases) for name, phrases in slots.items()}
    return tuple(re.compile(template.format(**fields)) for template in _TEMPLATES)


def read_caption(text: str) -> tuple[str, ...]:
    """The attributes that a caption names, in the order of `ATTRIBUTES`, as `world.values` gives them of its scene.

    Case and the number of blanks don't matter. Raises InputError for a text that is no caption of the world.
    """
    plain = " ".join(text.lower().split())
    for pattern in _patterns():
        if found := pattern.fullmatch(plain):
            layout, in_order = _relations()[found["relation"]]
            things = [_things()[found["one"]], _things()[found["other"]]]
            first, second = things if in_order else reversed(things)
            return layout, *first, *second, *_grounds()[found["ground"]]
    raise InputError(
        f"expected a caption of the demo's world, such as 'a red circle above a blue star on plain white', got {text!r}; "
        "prompt accuracy can only be read for those: give --prompts demo, or leave prompt accuracy out"
    )


def read_labels(texts: Sequence[str]) -> Tensor:
    """[N, 7] int64, columns in the order of `ATTRIBUTES`, as `World.labels` gives them; InputError as `read_caption`."""
    options = ATTRIBUTES.values()
    rows = [[names.index(v) for names, v in zip(options, read_caption(text), strict=True)] for text in texts]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(ATTRIBUTES))
